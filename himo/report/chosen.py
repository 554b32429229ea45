"""The images that `himo explain` scores, each with its caption in growing parts."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
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
        k: the number of segments to join the sentences to; None takes each sentence.
        at_most: the largest number of segments; more sentences are joined to this many.

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
    pool = _pool(open_items([data], None, options, None)[0], bool(options["allow_missing"]))
    chosen = Chosen(pool.images)
    rows = [_row_of(pool, data, name, k or 2) for name in wanted] or _drawn(pool, data, k)
    for row in rows:
        chosen.add(row, pool.names[row], *cut(*pool.parts(row), k))
    return chosen


@dataclass
class _Pool:
    """The images of a data set: their names by row, and the segments and prefixes of a row."""

    images: Images
    names: Sequence[str]
    parts: Callable[[int], tuple[list[str], list[str]]]


def _pool(item: Item, allow_missing: bool) -> _Pool:
    if item.opened is not None:
        index = item.opened[0]

        def parts(row: int) -> tuple[list[str], list[str]]:
            segments = caption_segments(" ".join(index[row].caption.split()))
            return segments, sentence_prefixes(segments)

        return _Pool(index, [index[row].image for row in range(len(index))], parts)
    if item.kind != "prefixes":
        raise HimoError(f"{item.name}: has no captions of one image that grow")
    records, _ = read_himo_docci(item.path, allow_missing=allow_missing)
    root = ImageRoot(item.image_root or os.path.dirname(os.path.abspath(item.path)))
    names = [record.image for record in records]
    images = ImageFiles(root, names, [record.place for record in records])
    return _Pool(images, names, lambda row: (records[row].segments(), records[row].prefixes))


def _row_of(pool: _Pool, data: str, name: str, least: int) -> int:
    """The first row of the image of this name with enough sentences."""
    rows = [row for row, of in enumerate(pool.names) if name in (of, os.path.basename(of))]
    if not rows:
        raise HimoError(f"--image: expected an image of {data}, got {name!r}")
    counts = {row: len(pool.parts(row)[0]) for row in rows}
    found = next((row for row, count in counts.items() if count >= least), None)
    if found is None:
        most = plural(max(counts.values()), "sentence")
        raise HimoError(f"{name}: expected at least {least} sentences, got {most}")
    return found


def _drawn(pool: _Pool, data: str, k: int | None) -> list[int]:
    """Some rows, the same for the same data; with more than three sentences, if k is not given."""
    order = random.Random(0).sample(range(len(pool.names)), len(pool.names))
    for least in (MORE_THAN + 1, 2) if k is None else (k,):
        long = (row for row in order if len(pool.parts(row)[0]) >= least)
        if found := sorted(islice(long, _DRAWN)):
            return found
    raise HimoError(f"{data}: expected captions of at least {k or 2} sentences, got none")


def cut(segments: list[str], prefixes: list[str], k: int | None) -> tuple[list[str], list[str]]:
    """Segments and prefixes joined to k, as HiMo@K cuts a caption; unchanged for None."""
    if k is None:
        return segments, prefixes
    ends = segment_boundaries(len(segments), k)
    joined = [" ".join(segments[start:end]) for start, end in pairwise([0, *ends])]
    return joined, [prefixes[end - 1] for end in ends]
