"""HiMo@K: does the similarity of image and text grow with every detail the text adds?"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo.data.paths import ImageRoot
from himo.data.records import (
    DECODER,
    RecordError,
    check_caption,
    check_encodable,
    check_text,
    json_error,
    lines,
)
from himo.errors import quoted
from himo.evaluate.encode import Coverage, Encoder, ImageFiles
from himo.evaluate.metrics import (
    MAX_SEGMENTS,
    growth_correlation,
    monotone_accuracy,
    segment_boundaries,
)
from himo.files import open_regular

# For K > 3 the paper's measure is a correlation. The paper does not say into how many parts it cuts
# the captions of a data set; here each sentence is a part.
K_RULE = f"K = sentences of the caption, where more than 3, at most {MAX_SEGMENTS}"
GIVEN_K_RULE = "K = prefixes of the image"  # of HiMo-Docci
MORE_THAN = 3


def himo_at(series: Sequence[Tensor], segments: int) -> dict[str, Any]:
    """HiMo@2 or HiMo@3 of captions that are cut into `segments` parts.

    Args:
        series: for each caption the scores [n] of its first 1, ..., n sentences.
        segments: K; captions of fewer sentences are left out.

    Returns:
        {"value": percent or None, "used": captions, "left_out": captions}.
    """
    used, scores = cut_in(series, segments)
    value = monotone_accuracy(scores) if used else None
    return {"value": value, "used": len(used), "left_out": len(series) - len(used)}


def cut_in(series: Sequence[Tensor], segments: int) -> tuple[list[int], Tensor]:
    """The captions of at least `segments` sentences, and their scores [N, segments]."""
    used = [position for position, scores in enumerate(series) if len(scores) >= segments]
    rows = [
        series[x][[end - 1 for end in segment_boundaries(len(series[x]), segments)]] for x in used
    ]
    return used, torch.stack(rows) if rows else torch.empty(0, segments)


def himo_k(series: Sequence[Tensor], more_than: int = MORE_THAN) -> dict[str, Any]:
    """HiMo@K averaged over captions, with K the length of each series; see K_RULE.

    Args:
        series: for each caption the scores [K] of its first 1, ..., K parts.
        more_than: series with at most this many scores are left out.

    Returns:
        {"value": mean correlation or None, "used", "left_out", "K": [...], "rho": [...]}, the last
        two for each caption used.
    """
    lengths = [len(scores) for scores in series]
    used = [position for position, length in enumerate(lengths) if length > more_than]
    rho = torch.full((len(series),), torch.nan, dtype=torch.float64)
    for length in {lengths[position] for position in used}:
        where = [position for position in used if lengths[position] == length]
        rho[where] = growth_correlation(torch.stack([series[position] for position in where]))
    return {
        "value": rho[used].mean().item() if used else None,
        "used": len(used),
        "left_out": len(series) - len(used),
        "K": [lengths[position] for position in used],
        "rho": rho[used].tolist(),
    }


def word_counts(
    texts: Sequence[str], series: Sequence[Tensor], more_than: int = MORE_THAN
) -> list[int]:
    """The words of each text that `himo_k` of the same series uses, in its order."""
    pairs = zip(texts, series, strict=True)
    return [len(text.split()) for text, scores in pairs if len(scores) > more_than]


@dataclass
class PrefixedImage:
    """One line of HiMo-Docci: an image and K increasingly complete texts, K >= 2."""

    place: str  # file and line, for messages
    image: str
    prefixes: list[str]

    def segments(self) -> list[str]:
        """What each text adds to the one before."""
        before = ["", *self.prefixes[:-1]]
        return [added_text(old, new) for old, new in zip(before, self.prefixes, strict=True)]


def read_himo_docci(
    path: str | os.PathLike[str], *, allow_missing: bool = False
) -> tuple[list[PrefixedImage], Coverage]:
    """The lines of HiMo-Docci, `{"img_path": ..., "caption": [t_1, ..., t_K], "raw_caption": ...}`.

    Raises:
        HimoError: a line has another form (`allow_missing` counts it instead), or no line has this
            form.
    """
    coverage = Coverage(0, allow_missing)
    records = []
    with open_regular(path) as file:
        for number, line in lines(os.fspath(path), file, lambda done: None):
            if line is not None and not line.strip():
                continue
            coverage.total += 1
            place = f"{path}:{number}"
            try:
                records.append(_prefixed_image(place, line))
            except RecordError as error:
                coverage.leave_out(error.reason, f"{place}: {error}")
    coverage.check(os.fspath(path))
    return records, coverage


def score_himo_docci(
    encoder: Encoder,
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    allow_missing: bool = False,
) -> "PrefixScores":
    """Scores of every prefix of HiMo-Docci with its image.

    Args:
        encoder: the model.
        path: the file of prefixes.
        image_root: where its image paths begin; by default the directory of the file.
        allow_missing: leaves out, and counts, what cannot be used.

    Raises:
        HimoError: as `read_himo_docci`; an image that cannot be read.
    """
    records, coverage = read_himo_docci(path, allow_missing=allow_missing)
    root = ImageRoot(image_root or os.path.dirname(os.path.abspath(path)))
    images = ImageFiles(root, [x.image for x in records], [x.place for x in records])
    failed: set[int] = set()

    def leave_out(position: int, reason: str, message: str) -> None:
        coverage.leave_out(reason, message)
        failed.add(position)

    features = encoder.images(images, range(len(records)), leave_out)
    coverage.check(os.fspath(path))
    readable = [position for position in range(len(records)) if position not in failed]
    texts = [text for position in readable for text in records[position].prefixes]
    lengths = [len(records[position].prefixes) for position in readable]
    pair_image = torch.tensor(readable).repeat_interleave(torch.tensor(lengths))
    scored = encoder.score_texts(texts, torch.arange(len(texts)), pair_image, features, 0)
    series = []
    for position, scores, wrong in zip(
        readable, scored.scores.split(lengths), scored.not_finite.split(lengths), strict=True
    ):
        if wrong.any():
            message = f"{images.describe(position)}: features of a text are not finite"
            leave_out(position, "not_finite", message)
        else:
            series.append(scores)
    coverage.check(os.fspath(path))
    used = [position for position in readable if position not in failed]
    return PrefixScores([records[x] for x in used], used, images, series, coverage, scored.cut)


@dataclass
class PrefixScores:
    """The result of `score_himo_docci`: records used, with the row of their image and scores."""

    records: list[PrefixedImage]
    rows: list[int]  # of `images`
    images: ImageFiles
    series: list[Tensor]  # [K] each
    coverage: Coverage
    cut: int  # texts longer than the model's context


def added_text(before: str, after: str) -> str:
    """The part of `after` that is not in `before`, from the start of the word that differs."""
    pairs = enumerate(zip(before, after, strict=False))
    common = next((at for at, (old, new) in pairs if old != new), min(len(before), len(after)))
    if any(character.isalnum() for character in before[common:]):
        common = after.rfind(" ", 0, common) + 1  # other words, not only other punctuation
    return after[common:].strip()


def _prefixed_image(place: str, line: str | None) -> PrefixedImage:
    if line is None:
        raise RecordError("too_long", "line is too long")
    try:
        value = DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise json_error(error) from error
    if not isinstance(value, dict) or not {"img_path", "caption"} <= value.keys():
        raise RecordError("type", f"{quoted(value)} has no img_path and caption")
    texts = value["caption"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= MAX_SEGMENTS:
        expected = f"expected a list of 2 to {MAX_SEGMENTS} texts"
        raise RecordError("caption_count", f"caption is {quoted(texts)}, {expected}")
    prefixes = [check_caption(text, f"caption {number}") for number, text in enumerate(texts, 1)]
    image = check_text(value["img_path"], "img_path")
    if not image or not all(prefixes):
        raise RecordError("empty", "img_path or a caption is empty")
    prefixes = [" ".join(text.split()) for text in prefixes]
    check_encodable(prefixes)
    return PrefixedImage(place, image, prefixes)
