"""Captions whose image a model does not rank first, beside the image that it does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 6  # of all runs together, and at least 2 of each


@dataclass(frozen=True)
class Miss:
    """One caption; the images are (name, thumbnail), a thumbnail that cannot be shown is None."""

    caption: str
    rank: int
    image: tuple[str, str | None]
    first: tuple[str, str | None]


def shown(misses: Sequence[Sequence[Miss]]) -> list[tuple[int, Miss]]:
    """The first misses of each run, as (run, miss)."""
    each = max(2, _SHOWN // max(1, len(misses)))
    return [(run, miss) for run, of_run in enumerate(misses) for miss in of_run[:each]]


def read(entries: Any, is_thumbnail: Callable[[Any], bool]) -> tuple[list[Miss], int]:
    """The misses in eval.json, and how many entries are none."""
    misses, bad = [], 0
    for entry in entries if isinstance(entries, list) else []:
        fields = entry if isinstance(entry, dict) else {}
        caption, rank = fields.get("caption"), fields.get("rank")
        pictures = [_read_picture(fields.get(key), is_thumbnail) for key in ("image", "first")]
        if not isinstance(caption, str) or type(rank) is not int or None in pictures:
            bad += 1
            continue
        own, other = (picture for picture in pictures if picture is not None)
        misses.append(Miss(caption, rank, own, other))
    return misses, bad


def _read_picture(value: Any, is_thumbnail: Callable[[Any], bool]) -> tuple[str, str | None] | None:
    if not isinstance(value, dict):
        return None
    thumbnail = value.get("thumbnail")
    return str(value.get("name", "")), thumbnail if is_thumbnail(thumbnail) else None
