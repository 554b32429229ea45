"""The inputs of a training run: the data set, as its reader opens it, and the checkpoint."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from himo import checkpoint as checkpoints
from himo.config import TrainConfig
from himo.data import CaptionedImages, SampleIndex
from himo.errors import HimoError
from himo.flags import flag
from himo.model import CONTEXT_LENGTH, CLIPConfig
from himo.progress import passing_bar
from himo.tokenizer import TextError, default_tokenizer
from himo.tools.doctor.check import Check
from himo.training_data import open_source, trained_pairs, unread
from himo.transforms import ImageError, Preprocess

_IMAGES, _CAPTIONS = 100, 2000  # read, evenly over the data set
_EXAMPLES = 3  # of bad images


def opened(settings: TrainConfig, field: str, folder: str) -> SampleIndex | Check:
    """A data set, its index in the folder; a problem if it cannot be opened.

    field: "train_data" or "val_data" of the settings.
    """
    # Every bad record and missing image is counted; the trainer would stop.
    try:
        complete: dict[str, Any] = {"skip_missing_images": True, "max_bad_fraction": 1.0}
        return open_source(settings, getattr(settings, field), **complete, cache_dir=folder)
    except (HimoError, OSError) as error:  # OSError: a disk that fails
        return Check("data", "problem", f"{flag(field)}: {error}")


def pairs(settings: TrainConfig, data: SampleIndex | Check | None) -> int | None:
    """The pairs to train on; None where the data do not tell, or none are left."""
    if not isinstance(data, SampleIndex) or len(data) <= settings.held_out:
        return None
    left = len(data) - settings.held_out
    return min(left, settings.train_num_samples or left)


def data_set(
    settings: TrainConfig, config: CLIPConfig, field: str, data: SampleIndex | Check
) -> Iterator[Check]:
    """Records, missing images by source, unreadable images and long captions of a data set.

    field, data: as for `opened`, and its result.
    """
    prefix = "" if field == "train_data" else "val "
    checks: Iterable[Check]
    if isinstance(data, Check):
        checks = [data]
    else:
        advice = _too_few(settings, len(data)) if field == "train_data" else None
        checks = _contents(settings, config, data, advice)
        if field == "train_data" and advice is None:
            checks = itertools.chain(_unread(settings, data), checks)
    for check in checks:
        yield dataclasses.replace(check, name=prefix + check.name)


def _contents(
    settings: TrainConfig, config: CLIPConfig, index: SampleIndex, advice: str | None
) -> Iterator[Check]:
    yield _records(settings, index, advice)
    if index.report.missing_count:
        yield _missing(settings, index)
    preprocess, short = Preprocess.of(config, settings.image_mode), settings.short_captions
    dataset = CaptionedImages(index, preprocess, _all_tokens, short_captions=short)
    yield _images(settings, dataset)
    yield _captions(dataset)


def _records(settings: TrainConfig, index: SampleIndex, advice: str | None) -> Check:
    report = index.report
    found = f"{len(index):,} pairs ({report.kind}) of {report.total:,} records"
    if report.bad_count:
        bad = _by_reason(report.bad)
        found += f", {report.bad_count:,} bad ({bad}), first: {report.bad_examples[0]}"
    if report.bad_count > settings.max_bad_fraction * report.total:
        share = f"more than --max-bad-fraction {settings.max_bad_fraction:g}"
        return Check("data", "problem", f"{found}; {share}: mend them, or raise it")
    if advice is not None:
        return Check("data", "problem", f"{found}; {advice}")
    if report.bad_count:
        return Check("data", "warning", f"{found}; the trainer leaves them out")
    return Check("data", "ok", found)


def _by_reason(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _unread(settings: TrainConfig, index: SampleIndex) -> Iterator[Check]:
    try:
        for said in unread(settings, trained_pairs(settings, index)):
            yield Check("data", "warning", said)
    except HimoError as error:
        yield Check("data", "problem", str(error))


def _too_few(settings: TrainConfig, pairs: int) -> str | None:
    # Why the pairs are too few; None if they are enough.
    first, count = settings.held_out, settings.train_num_samples
    if first >= pairs:
        return f"--held-out {first} leaves none"
    if count is not None and first + count > pairs:
        return f"--train-num-samples {count}: expected at most {pairs - first}"
    batch = settings.batch_size * settings.accum_freq
    if (pairs - first if count is None else count) >= batch or settings.keep_last_batch:
        return None
    left = " left" if first or count is not None else ""
    return f"fewer{left} than a batch of {batch}: a smaller --batch-size, or --keep-last-batch"


def _missing(settings: TrainConfig, index: SampleIndex) -> Check:
    found = index.report.missing_images()
    if settings.skip_missing_images:
        return Check("images", "warning", f"{found}; --skip-missing-images leaves them out")
    advice = "--skip-missing-images trains without them, --image-root names where they are"
    return Check("images", "problem", f"{found}; {advice}")


def _images(settings: TrainConfig, dataset: CaptionedImages) -> Check:
    rows = _spread(len(dataset), _IMAGES)
    reasons: Counter[str] = Counter()
    bad = []
    for row in passing_bar(rows, "reading images"):
        try:
            dataset.image(row)
        except ImageError as error:
            reasons[error.reason] += 1
            bad.append(dataset.index.describe(row))
    found = f"{len(rows) - len(bad)} of {len(rows)} looked at can be read"
    if not bad:
        return Check("images", "ok", found)
    found += f" ({_by_reason(reasons)}), first: {', '.join(bad[:_EXAMPLES])}"
    if len(bad) > settings.max_bad_fraction * len(rows):
        share = f"more than --max-bad-fraction {settings.max_bad_fraction:g} ends a run"
        return Check("images", "problem", f"{found}; {share}: mend them, or raise it")
    return Check("images", "warning", f"{found}; the trainer takes other pairs in their place")


def _captions(dataset: CaptionedImages) -> Check:
    rows = _spread(len(dataset), _CAPTIONS)
    longer = longest = 0
    for row in passing_bar(rows, "reading captions"):
        try:
            length = len(dataset.tokens(row)) + 2  # with start and end
        except TextError as error:
            where = dataset.index.describe(row)
            advice = "the trainer takes other pairs in the place of such"
            return Check("captions", "warning", f"{where}: {error}; {advice}")
        longest = max(longest, length)
        longer += length > CONTEXT_LENGTH
    found = f"{longer:,} of {len(rows):,} looked at are longer than {CONTEXT_LENGTH} tokens"
    if longer:
        return Check("captions", "warning", f"{found}; the trainer cuts them there")
    return Check("captions", "ok", f"{found}, the longest has {longest}")


def _all_tokens(caption: str) -> Tensor:  # [1, its length], not cut where the context ends
    return torch.tensor([default_tokenizer().encode(caption)])


def _spread(length: int, most: int) -> range:
    # Evenly, because a data set may hold one source after the other.
    return range(0, length, max(1, -(-length // most)))


def checkpoint(path: str, settings: TrainConfig) -> tuple[Check, CLIPConfig | None]:
    """A checkpoint's format and whether all of it loads; its configuration, if it does."""
    given = {name: getattr(settings, name) for name in checkpoints.CHOICES}
    try:
        state, metadata = checkpoints.read_state_dict(path)
        model, _ = checkpoints.load(path, stretch=True, **given)
    except HimoError as error:
        return Check("checkpoint", "problem", f"--pretrained: {error}"), None
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    sizes = (
        f"{count:.1f} M parameters",
        f"images of {config.image_resolution} pixels in patches of {config.vision_patch_size}",
        f"{config.vision_layers} and {config.text_layers} layers",
        f"{config.embed_dim} features",
    )
    kind = f"layout {metadata['layout']} in {metadata['container']}"
    found = f"{path}: {kind}, {', '.join(sizes)}; every tensor has its place"
    if state["positional_embedding"].shape[0] != config.context_length:
        found += f"; its text positions are stretched to {config.context_length}"
    if metadata["checksum"] == "none":
        advice = "himo convert writes a file with one"
        return Check("checkpoint", "warning", f"{found}; no checksum: {advice}"), config
    return Check("checkpoint", "ok", f"{found}; {metadata['checksum']} verified"), config
