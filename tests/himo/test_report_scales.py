"""Axes, numbers and curves of the report's charts."""

import math
import random
from itertools import pairwise

import pytest

from himo.report import series
from himo_charts import scales


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7e6), (0.12, 0.121), (1e-9, 3e-9), (5, 5000), (-2e-3, 0)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    scale = scales.fit([low, high], margin=0)
    assert scale is not None
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))
    assert all(low - 1e-9 * (high - low) <= tick <= high + 1e-9 * (high - low) for tick in ticks)
    mantissa = float(f"{steps[0]:e}".split("e")[0])
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 2.5, 5))
    labels = scales.tick_labels(ticks)
    assert len(set(labels)) == len(labels)


def test_log_scale_and_degenerate_ranges() -> None:
    scale = scales.fit([0.01, 1000.0], log=True)
    assert scale is not None and scale.log
    assert scale.at(math.sqrt(0.01 * 1000)) == pytest.approx(0.5)
    assert {0.01, 1.0, 100.0} <= {round(tick, 9) for tick in scale.ticks()}
    assert scales.fit([]) is None and scales.fit([math.nan, None, math.inf]) is None
    assert scales.fit([-1e308, 1e308, 1.7e308]) is None
    for value in (0.0, 3.0, -4.0):
        flat = scales.fit([value])
        assert flat is not None and flat.low < value < flat.high


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (0.123456, "0.1235"), (99.97, "99.97"), (-2.5, "−2.500"),
     (5e-6, "5e-6"), (1.234e-5, "1.23e-5"), (math.nan, "NaN"), (-math.inf, "−∞"), (None, "–"),
     (2.5e12, "2.5e12")],
)  # fmt: skip
def test_number(value: float | None, shown: str) -> None:
    assert scales.number(value) == shown


def test_smoothing_and_thinning_keep_what_matters() -> None:
    rng = random.Random(3)
    y: list[float | None] = [rng.gauss(5, 1) for _ in range(5000)]
    y[2500], y[100], y[101] = 90.0, None, math.nan
    smooth = series.smoothed(y, 200, range(5000))
    assert smooth[0] == y[0] and smooth[-1] == y[-1]
    assert all(abs(value - 5) < 1.2 for value in smooth[200:-200])
    assert series.smoothed([1e308] * 5, 4, [2]) == [pytest.approx(1e308)]
    assert series.smoothed([1.0, 1e20, 1.0, 2.0], 2, [3]) == [2.0]  # no rounding by a spike
    assert series.smoothed([0.0, 3.0, 9.0], 2, [1]) == [(0.5 * 0 + 3 + 0.5 * 9) / 2]
    x, thinned = series.thin(list(range(5000)), y, 200)
    assert len(x) <= 204 and max(v for v in thinned if not math.isnan(v)) == 90.0
    assert (x[0], x[-1]) == (0, 4999)
    gap = series.thin([0, 1, 2, 3], [1.0, None, math.inf, 2.0], 100)[1]
    assert gap[0] == 1.0 and math.isnan(gap[1]) and math.isnan(gap[2])
    assert all(math.isnan(value) for value in series.smoothed([None, math.nan], 4, [0, 1]))
