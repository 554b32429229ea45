"""All measures of a captioned data set; its images and captions are encoded once."""

import argparse
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo.data import DATASET_TYPES, SampleIndex, open_dataset
from himo.data.splits import listed_splits
from himo.errors import note
from himo.evaluate.encode import Coverage, Encoder, TextScores
from himo.evaluate.himo_k import K_RULE, himo_at, himo_k, word_counts
from himo.evaluate.metrics import (
    MAX_SEGMENTS,
    caption_segments,
    sentence_prefixes,
)
from himo.evaluate.retrieval import CaptionedSet, group_by_image, retrieval
from himo.evaluate.sentences import SENTENCE_RULE, SENTENCE_RULE_SHA256, split_sentences


@dataclass
class CaptionScores:
    """The result of `evaluate_captions`.

    Attributes:
        index: the data set.
        captions: the images and captions that took part.
        texts: the number of the text of each caption, as `CaptionedSet.texts`.
        series: for each caption the scores [n] of its first 1, ..., n segments, which are its
            sentences unless there are more than MAX_SEGMENTS.
        coverage: of its records.
        image_features: [N, E] and
        text_features: [M, E], float32 on the CPU, L2-normalised, in the order of `captions`.
        sections: the parts of eval.json: protocol, retrieval, himo, coverage, histogram.
    """

    index: SampleIndex
    captions: CaptionedSet
    texts: list[int]
    series: list[Tensor]
    coverage: Coverage
    image_features: Tensor
    text_features: Tensor
    sections: dict[str, Any]


def open_for_evaluation(
    source: str | os.PathLike[str], *, allow_missing: bool, **options: Any
) -> tuple[SampleIndex, Coverage]:
    """The index of a data set, and how many records are left out of it.

    Args:
        source: as `himo.data.open_dataset`.
        allow_missing: counts malformed records and missing images, which are otherwise errors.
        options: of `open_dataset`.

    Raises:
        HimoError: as `open_dataset`; a malformed record, or an image that is missing.
    """
    index = open_dataset(source, max_bad_fraction=1.0, skip_missing_images=True, **options)
    report = index.report
    coverage = Coverage(report.total, allow_missing)
    for reason, count in report.bad.items():
        message = f"{report.bad_count} of {report.total} records are bad: {report.bad_examples[0]}"
        coverage.leave_out(reason, message, count)
    if report.missing_count:
        found = f"{report.missing_count} of {report.total} images are missing"
        message = f"{report.source}: {found}: {report.missing_examples[0]}"
        coverage.leave_out("missing", message, report.missing_count)
    if len(report.splits) > 1 and options.get("split") is None:
        there = listed_splits(report.splits)
        note(f"{report.source}: all splits are used, {there}; --split takes one")
    return index, coverage


# Arguments of `open_for_evaluation` and their flags.
DATA_OPTIONS = {
    "allow_missing": "allow_missing",
    "dataset_type": "dataset_type",
    "image_root": "image_root",
    "image_key": "csv_img_key",
    "caption_key": "csv_caption_key",
    "separator": "csv_separator",
    "split": "split",
    "first_line": "first_line",
    "follow_links": "follow_links",
}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how a data set is read; `data_options` reads them."""
    parser.add_argument("--dataset-type", default="auto", choices=DATASET_TYPES)
    parser.add_argument("--image-root", help="directory that image paths are relative to")
    parser.add_argument("--csv-separator", help="of a csv file; found by itself by default")
    parser.add_argument("--csv-img-key", help="column or key of the image path")
    parser.add_argument("--csv-caption-key", help="column or key of the caption")
    parser.add_argument("--split", help="of a file with several, as DOCCI's and Karpathy's: test")
    parser.add_argument(
        "--first-line", action="store_true", help="of each text of a folder, as Urban1k is read"
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="let links in the data leave the image root"
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="leave out, and count, what cannot be used, instead of stopping at the first",
    )


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_for_evaluation` that the flags of `add_data_arguments` give."""
    return {option: getattr(args, flag) for option, flag in DATA_OPTIONS.items()}


def evaluate_captions(
    encoder: Encoder, index: SampleIndex, coverage: Coverage, captions_per_image: int | None = None
) -> CaptionScores:
    """Retrieval both ways, HiMo@2, HiMo@3 and HiMo@K.

    The prefixes of a caption end with the caption itself, so every measure comes from one
    pass over the texts.

    Args:
        encoder: the model.
        index, coverage: from `open_for_evaluation`.
        captions_per_image: see `group_by_image`.

    Raises:
        HimoError: an image or caption cannot be used, unless `coverage` allows it; none is left.
    """
    source = index.report.source
    captions = group_by_image(index, coverage, captions_per_image)
    coverage.check(source)
    counts = torch.tensor(captions.caption_images).bincount(minlength=len(captions.image_rows))
    failed: set[int] = set()

    def leave_out(image: int, reason: str, message: str) -> None:
        coverage.leave_out(reason, message, int(counts[image]))
        failed.add(image)

    image_features = encoder.images(index, captions.image_rows, leave_out)
    coverage.check(source)
    image_features = image_features[sorted(set(captions.caption_images) - failed)]
    captions = captions.without(failed, set())

    series, scored, bad = score_prefixes(encoder, captions, image_features)
    for caption in bad:
        where = index.describe(captions.caption_rows[caption])
        coverage.leave_out("not_finite", f"{where}: features of its caption are not finite")
    coverage.check(source)
    text_features = scored.features
    if bad:
        left = sorted(set(range(len(captions.captions))) - set(bad))
        images = sorted({captions.caption_images[caption] for caption in left})
        image_features, text_features = image_features[images], text_features[left]
        series = [series[caption] for caption in left]
        captions = captions.without(set(), set(bad))

    texts, device = captions.texts(), encoder.device
    ways = retrieval(
        image_features.to(device), text_features.to(device), captions.caption_images, texts
    )
    at_k = himo_k(series)
    histogram = {key: at_k.pop(key) for key in ("K", "rho")}
    histogram["words"] = word_counts(captions.captions, series)
    shown = ("image_to_text", "text_to_image", "chance_R@1", "ties")
    sections = {
        "protocol": _protocol(index, captions, texts, ways, scored.cut),
        "retrieval": {name: ways[name] for name in shown},
        "himo": {"HiMo@2": himo_at(series, 2), "HiMo@3": himo_at(series, 3), "HiMo@K": at_k},
        "coverage": coverage.to_dict(),
        "histogram": histogram,
        "ranks": ways["ranks"],
    }
    return CaptionScores(
        index, captions, texts, series, coverage, image_features, text_features, sections
    )


def score_prefixes(
    encoder: Encoder, captions: CaptionedSet, image_features: Tensor
) -> tuple[list[Tensor], TextScores, list[int]]:
    """(scores [n] of each caption's prefixes, features of the captions, captions not finite)."""
    prefixes = [sentence_prefixes(caption_segments(caption)) for caption in captions.captions]
    lengths = [len(texts) for texts in prefixes]
    count = len(captions.captions)
    owner = torch.arange(count).repeat_interleave(torch.tensor(lengths))  # the caption of a prefix
    scored = encoder.score_texts(
        captions.captions + [text for texts in prefixes for text in texts],
        torch.arange(count, count + len(owner)),
        torch.tensor(captions.caption_images)[owner],
        image_features,
        count,
    )
    is_bad = scored.not_finite[:count].clone()
    is_bad[owner[scored.not_finite[count:]]] = True
    return list(scored.scores.split(lengths)), scored, is_bad.nonzero()[:, 0].tolist()


def _protocol(
    index: SampleIndex,
    captions: CaptionedSet,
    texts: list[int],
    ways: dict[str, Any],
    texts_cut: int,
) -> dict[str, Any]:
    """The data and the rules of the measures: the first section of eval.json."""
    return {
        "dataset": os.fspath(index.report.source),
        "dataset_type": index.report.kind,
        "dataset_sha256": index.report.sha256,
        "images": len(captions.image_rows),
        "captions": len(captions.captions),
        "texts": ways["texts"],
        "pairs": ways["pairs"],
        "shared_captions": captions.shared(texts),
        "positives": captions.positives(),
        "ties": "pessimistic",
        "precision": "float32",
        "sentence_rule": SENTENCE_RULE,
        "sentence_rule_sha256": SENTENCE_RULE_SHA256,
        "k_rule": K_RULE,
        "texts_cut": texts_cut,
        "captions_segmented": sum(
            len(split_sentences(caption)) > MAX_SEGMENTS for caption in captions.captions
        ),
    }
