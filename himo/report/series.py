"""Logged series for a chart: moving averages, fewer points, values at a step."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def smoothed(y: Sequence[float | None], window: int, places: Iterable[int]) -> list[float]:
    """The moving average at some indices, with weights that fall linearly over a centred window.

    The window shrinks symmetrically near the ends, so the curve does not lag and its last value is
    the last one logged. Values that are not finite are skipped; NaN where the window has no other.
    """
    values = np.array([math.nan if value is None else value for value in y])
    good = np.isfinite(values)
    values[~good] = 0.0
    means = []
    for place in places:
        reach = min(window // 2, place, len(y) - 1 - place)
        near = slice(place - reach, place + reach + 1)
        weights = (1 - np.abs(np.arange(-reach, reach + 1)) / (reach + 1)) * good[near]
        total = weights.sum()
        means.append(float(values[near] @ (weights / total)) if total else math.nan)
    return means


def thin(
    x: Sequence[float], y: Sequence[float | None], points: int
) -> tuple[list[float], list[float]]:
    """About `points` of a curve at most: the least and the greatest value of each stretch.

    None becomes NaN; a stretch without a finite value stays a gap.
    """
    values = [math.nan if v is None or not math.isfinite(v) else v for v in y]
    if len(x) <= points:
        return list(x), values
    stretch = math.ceil(len(x) / max(1, points // 2))
    chosen = {0, len(x) - 1}
    for start in range(0, len(x), stretch):
        indices = range(start, min(start + stretch, len(x)))
        finite = [i for i in indices if not math.isnan(values[i])] or [start]
        chosen |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return [x[i] for i in sorted(chosen)], [values[i] for i in sorted(chosen)]


def spread(count: int, at_most: int) -> list[int]:
    """At most `at_most` indices below `count`, evenly spaced, the first and last among them."""
    if count <= at_most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (at_most - 1)) for i in range(at_most)})


def value_at(x: Sequence[float], y: Sequence[float | None], place: float) -> float | None:
    """The value logged last at or before `place`; None before the first and after the last."""
    if not x or place > x[-1]:
        return None
    index = bisect_right(x, place) - 1
    return y[index] if index >= 0 else None
