"""The split of a record, where an annotation file holds several: train, val, test."""

from typing import Any

from himo.errors import HimoError

_MAX_NAMES = 20  # of splits that are counted
_MAX_NAME = 40  # characters


class Splits:
    """Tells which records are read, and counts the records of each split.

    Args:
        wanted: the split to read; None reads all, and records without a split.
    """

    def __init__(self, wanted: str | None) -> None:
        self.wanted = wanted
        self.counts: dict[str, int] = {}

    def takes(self, split: Any) -> bool:
        """Whether a record with this value of its key `split` is read; counts it."""
        if isinstance(split, str):
            name = split[:_MAX_NAME]
            if name in self.counts or len(self.counts) < _MAX_NAMES:
                self.counts[name] = self.counts.get(name, 0) + 1
        return self.wanted is None or split == self.wanted

    def check(self, path: str) -> None:
        """HimoError if the split that is wanted has no record."""
        if self.wanted is not None and self.wanted not in self.counts:
            there = listed_splits(self.counts) or "no records with a split"
            raise HimoError(f"{path}: expected records of split {self.wanted!r}, there are {there}")


def listed_splits(counts: dict[str, int]) -> str:
    """The records of each split, to follow a sentence."""
    return ", ".join(f"{count:,} of {name}" for name, count in counts.items())
