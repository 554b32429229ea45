"""Maps numbers to positions on an axis: scales, ticks and labels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_LOG_DECADES = 1.7  # a positive series that spans more decades than this gets a log axis


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """The position of a value: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, count: int = 5) -> list[float]:
        """About `count` round values within the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for mantissas in ((1,), (1, 3), (1, 2, 5)):
                ticks = [m * 10.0**d for d in decades for m in mantissas]
                ticks = [tick for tick in ticks if self.holds(tick)]
                if len(ticks) >= 3:
                    return ticks[:: math.ceil(len(ticks) / (count + 2))]
        step = nice_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def fit(
    values: Iterable[float | None], *, zero: bool = False, log: bool = False, margin: float = 0.05
) -> Scale | None:
    """A scale around the finite values, or None if there are none.

    Args:
        zero: starts the axis at zero.
        log: makes it logarithmic if the values are positive and span several decades.
        margin: added on both sides, as a share of the range.
    """
    finite = finite_only(values)
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if log and low > 0 and math.log10(high / low) > _LOG_DECADES:
        return Scale(low / 1.3, high * 1.3, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    padding = margin * (high - low) if high > low else 0.1 * abs(high) or 1.0
    if not math.isfinite(padding):  # the range overflows float64
        return None
    return Scale(low if zero and low == 0 else low - padding, high + padding)


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def finite_only(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def number(value: float | None, digits: int = 4) -> str:
    """A number for display: `digits` significant digits, thousands separators, a dash for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        mantissa, exponent = f"{value:.{max(0, digits - 2)}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return minus(f"{mantissa}e{int(exponent)}")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    if value == int(value):
        decimals = 0
    return minus(f"{value:,.{decimals}f}")


def fixed(value: float | None, decimals: int) -> str:
    """A number with fixed decimals, as in a column of percentages."""
    if value is None or not math.isfinite(value):
        return number(value)
    return minus(f"{value:,.{decimals}f}")


def minus(text: str) -> str:
    """Replaces a leading hyphen by a minus sign; exponents keep the hyphen."""
    return "−" + text[1:] if text.startswith("-") else text


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Labels of an axis, with equal numbers of decimals."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest >= 1e9 or 0 < largest < 1e-3:
        return [number(tick, 3) for tick in ticks]
    divisor, suffix = next(
        ((u, s) for u, s in ((1e6, "M"), (1e3, "k")) if largest >= 10 * u), (1.0, "")
    )
    scaled = [tick / divisor for tick in ticks]
    decimals = next(
        (d for d in range(7) if all(abs(v - round(v, d)) <= 1e-6 * abs(v) for v in scaled)), 7
    )
    return ["0" if value == 0 else minus(f"{value:,.{decimals}f}{suffix}") for value in scaled]
