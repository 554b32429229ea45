"""The data of a training run, as its settings name them."""

from functools import partial
from typing import Any

from himo.config import TrainConfig
from himo.data import (
    BatchLoader,
    CaptionedImages,
    EpochSampler,
    SampleIndex,
    make_loader,
    open_dataset,
    open_tokens,
)
from himo.errors import HimoError, note
from himo.flags import flag
from himo.model import CLIPConfig
from himo.parallel import Ranks
from himo.tokenizer import tokenize
from himo.transforms import Preprocess


def open_source(settings: TrainConfig, source: str, **changed: Any) -> SampleIndex:
    """Returns the data set at source, read as the settings say; `changed` replaces options."""
    options = {
        "image_root": settings.image_root,
        "image_key": settings.csv_img_key,
        "caption_key": settings.csv_caption_key,
        "separator": settings.csv_separator,
        "skip_missing_images": settings.skip_missing_images,
        "follow_links": settings.follow_links,
        "max_bad_fraction": settings.max_bad_fraction,
    }
    return open_dataset(source, settings.dataset_type, **options | changed)


def open_data(settings: TrainConfig, ranks: Ranks) -> tuple[SampleIndex, SampleIndex | None]:
    """Returns the pairs to train on and the pairs to validate on; prints which were left out."""

    def opened(source: str) -> SampleIndex:
        index = open_source(settings, source)
        if ranks.main:
            print(index.report.summary())
        return index

    index = opened(settings.train_data)
    held_out = opened(settings.val_data) if settings.val_data is not None else None
    if first := settings.held_out:
        held_out = index[:first]
    index = trained_pairs(settings, index)
    for said in unread(settings, index, held_out):
        if ranks.main:
            note(said)
    return index, held_out


def trained_pairs(settings: TrainConfig, index: SampleIndex) -> SampleIndex:
    """The pairs of --train-data without those of --held-out, as many as --train-num-samples.

    Raises:
        HimoError: one of the two is more than there are.
    """
    first, count = settings.held_out, settings.train_num_samples
    if first:
        if first >= len(index):
            raise HimoError(f"--held-out: expected fewer than {len(index)} pairs, got {first}")
        index = index[first:]
    if count is not None:
        if count > len(index):
            raise HimoError(
                f"--train-num-samples: expected at most {len(index)} pairs, got {count}"
            )
        index = index[:count]
    return index


def unread(
    settings: TrainConfig, index: SampleIndex, held_out: SampleIndex | None = None
) -> list[str]:
    """Notes on flags of the data that change nothing, or not for all pairs.

    Raises:
        HimoError: --short-captions, and no pair has one.
    """
    notes = []
    if settings.short_captions:
        count, pairs = index.short_captions(), len(index)
        if not count:
            raise HimoError(
                "--short-captions: expected pairs with a caption_short, got none among the "
                f"{pairs} of {settings.train_data}"
            )
        if count < pairs:
            notes.append(
                f"--short-captions: {pairs - count} of {pairs} pairs have no caption_short, and "
                "keep their caption"
            )
    roots = [data.origin.root for data in (index, held_out) if data is not None and data.origin]
    if not any(roots):
        for name in ("skip_missing_images", "follow_links"):
            if getattr(settings, name):
                notes.append(f"{flag(name)} changes nothing: the data hold their images")
    return notes


def training_pairs(
    settings: TrainConfig, index: SampleIndex, config: CLIPConfig
) -> CaptionedImages:
    """Returns the pairs, preprocessed and tokenized for a model of this configuration.

    Without --no-token-cache, encodes all captions if their tokens are not there yet. A dry run
    writes nothing, so it encodes none.
    """
    length, cache = config.context_length, None
    if settings.token_cache and not settings.dry_run:
        cache = open_tokens(index, length, workers=settings.workers)
    return CaptionedImages(
        index,
        Preprocess.of(config, settings.image_mode),
        partial(tokenize, context_length=length),
        seed=settings.seed,
        short_captions=settings.short_captions,
        cache=cache,
    )


def training_loader(
    settings: TrainConfig, pairs: CaptionedImages, sampler: EpochSampler, *, pin_memory: bool
) -> BatchLoader:
    """Returns a loader of the pairs in the order of the sampler."""
    return make_loader(
        pairs,
        sampler,
        workers=settings.workers,
        seed=settings.seed,
        max_bad_fraction=settings.max_bad_fraction,
        pin_memory=pin_memory,
    )
