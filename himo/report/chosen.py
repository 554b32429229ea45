"""The images that `himo explain` scores, each with its caption in growing parts."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from himo.data.paths import ImageRoot
from himo.errors import HimoError
from himo.evaluate.encode import GivenFiles, ImageFiles, Images
from himo.evaluate.himo_k import MORE_THAN, read_himo_docci
from himo.evaluate.metrics import caption_segments, segment_boundaries, sentence_prefixes
from himo.evaluate.suite import Item, open_items
from himo.report.runs import plural

_DRAWN = 6  # images, where none is named


@dataclass
class Chosen:
    """Some images: rows of `images`, and for each its name, segments and growing texts."""

    images: Images
    rows: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    segments: list[list[str]] = field(default_factory=list)
    prefixes: list[list[str]] = field(default_factory=list)

    def add(self, row: int, name: str, segments: list[str], prefixes: list[str]) -> None:
        self.rows.append(row)
        self.names.append(name)
        self.segments.append(segments)
        self.prefixes.append(prefixes)


def segments_of(captions: Sequence[str], k: int | None, *, at_most: int | None = None) -> list[str]:
    """The segments of a caption; several texts are a segment each.

    Args:
        k: how many segments to join the sentences to; None takes each sentence.
        at_most: of these, more are joined to so many.

    Raises:
        HimoError: fewer than two segments, or than k; an empty one.
    """
    several = len(captions) > 1
    segments = [c.strip() for c in captions] if several else caption_segments(captions[0])
    if len(segments) < max(2, k or 2) or not all(segments):
        wanted = f"at least {k}" if k is not None and k > 2 else "at least two"
        raise HimoError(
            f"caption: expected {wanted} sentences, or several texts, got {captions[0]!r}"
        )
    if at_most is not None and len(segments) > at_most:
        k = at_most
    return cut(segments, segments, k)[0]


def from_file(image: str, captions: Sequence[str], k: int | None) -> Chosen:
    """An image file and its caption; `captions` and `k` as in `segments_of`."""
    segments = segments_of(captions, k)
    chosen = Chosen(GivenFiles([image]))
    chosen.add(0, image, segments, sentence_prefixes(segments))
    return chosen


def from_data(data: str, wanted: Sequence[str], k: int | None, options: dict[str, Any]) -> Chosen:
    """Images of a data set with their captions, or HiMo-Docci's with the prefixes given there.

    Args:
        data: a path or NAME:FOLDER, as `himo eval --data`.
        wanted: images by their path in the data set or its last part; none draws some.
        k: as in `segments_of`; images with fewer sentences are not drawn.
        options: of `open_for_evaluation`.

    Raises:
        HimoError: the data set cannot be read, or has no such image or none of k sentences.
    """
    item = open_items([data], None, options, None)[0]
    images, entries = _entries(item, bool(options["allow_missing"]))
    least = k or 2
    chosen = Chosen(images)
    if wanted:
        found = {name: [entry for entry in entries if _is(entry[1], name)] for name in wanted}
        for name, of_name in found.items():
            if not of_name:
                raise HimoError(f"--image: expected an image of {data}, got {name!r}")
            long = [entry for entry in of_name if len(entry[2]) >= least]
            if not long:
                counted = plural(max(len(entry[2]) for entry in of_name), "sentence")
                raise HimoError(f"{name}: expected at least {least} sentences, got {counted}")
            row, image, segments, prefixes = long[0]
            chosen.add(row, image, *cut(segments, prefixes, k))
        return chosen
    # With more than three sentences where no number is asked for: their correlation says more.
    for fewest in (least,) if k else (MORE_THAN + 1, 2):
        long = [entry for entry in entries if len(entry[2]) >= fewest]
        if long:
            break
    if not long:
        raise HimoError(f"{data}: expected captions of at least {least} sentences, got none")
    drawn = sorted(random.Random(0).sample(range(len(long)), min(_DRAWN, len(long))))
    for row, image, segments, prefixes in (long[place] for place in drawn):
        chosen.add(row, image, *cut(segments, prefixes, k))
    return chosen


def cut(segments: list[str], prefixes: list[str], k: int | None) -> tuple[list[str], list[str]]:
    """Segments and prefixes joined to k, as HiMo@K cuts a caption; unchanged for None."""
    if k is None:
        return segments, prefixes
    ends = segment_boundaries(len(segments), k)
    joined = [" ".join(segments[start:end]) for start, end in pairwise([0, *ends])]
    return joined, [prefixes[end - 1] for end in ends]


def _entries(
    item: Item, allow_missing: bool
) -> tuple[Images, list[tuple[int, str, list[str], list[str]]]]:
    """The images of a set, and each caption as (row, name, segments, prefixes)."""
    if item.opened is not None:
        index = item.opened[0]
        entries = []
        for row in range(len(index)):
            segments = caption_segments(" ".join(index[row].caption.split()))
            entries.append((row, index[row].image, segments, sentence_prefixes(segments)))
        return index, entries
    if item.kind != "prefixes":
        raise HimoError(f"{item.name}: has no captions of one image that grow")
    records, _ = read_himo_docci(item.path, allow_missing=allow_missing)
    root = ImageRoot(item.image_root or os.path.dirname(os.path.abspath(item.path)))
    images = ImageFiles(root, [x.image for x in records], [x.place for x in records])
    return images, [(row, x.image, x.segments(), x.prefixes) for row, x in enumerate(records)]


def _is(image: str, name: str) -> bool:
    return name in (image, os.path.basename(image))
