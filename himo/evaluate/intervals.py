"""Bootstrap intervals: how far a result moves if other images of the same kind are scored."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from himo.errors import HimoError

DRAWS = 2000
_CHUNK = 1 << 22  # positions drawn at a time
_PERCENTILES = (2.5, 97.5)
INTERVAL_RULE = (
    f"95 %: percentiles {_PERCENTILES[0]} and {_PERCENTILES[1]} of the result over {DRAWS:,} draws "
    "of as many images with replacement; the captions of an image stay together"
)


@dataclass(frozen=True)
class Estimate:
    """A result, and its value in each of DRAWS bootstrap draws."""

    value: float
    draws: "np.ndarray[Any, np.dtype[np.float64]]"  # [DRAWS]

    def interval(self) -> tuple[float, float]:
        """The bounds of the 95 % interval."""
        low, high = np.percentile(self.draws, _PERCENTILES)
        return float(low), float(high)


def estimate(
    values: Sequence[float], groups: Sequence[int] | None = None, *, name: str = ""
) -> Estimate:
    """The mean of N values, with the draws of the bootstrap (Efron and Tibshirani, 1993).

    Args:
        values: one for each query.
        groups: the image of each value, integers from 0 on: an image is drawn with all its values.
            By default each value is an image of its own.
        name: of the data set. Draws of one name and size are the same in every run. Draws of two
            names are independent, so that their mean can be estimated.

    Raises:
        HimoError: there is no value, or a group too few.
    """
    if len(values) == 0 or (groups is not None and len(groups) != len(values)):
        got = f"{len(values)} and {len(values if groups is None else groups)}"
        raise HimoError(f"estimate: expected as many values as groups, at least one, got {got}")
    owner = np.arange(len(values)) if groups is None else np.asarray(groups)
    counts = np.bincount(owner)
    sums = np.bincount(owner, weights=np.asarray(values, dtype=np.float64))[counts > 0]
    counts = counts[counts > 0]
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    draws = np.empty(DRAWS)
    rows = max(1, _CHUNK // len(sums))
    for start in range(0, DRAWS, rows):
        part = draws[start : start + rows]
        drawn = generator.integers(len(sums), size=(len(part), len(sums)))
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return Estimate(float(sums.sum() / counts.sum()), draws)


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of the results of different data sets."""
    return Estimate(
        sum(x.value for x in estimates) / len(estimates),
        np.mean([x.draws for x in estimates], axis=0),
    )
