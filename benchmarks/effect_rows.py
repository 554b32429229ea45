"""The rows and the page of `make effect`, from the results of its runs. Nothing is trained here."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import mean, stdev
from typing import Any

from benchmarks import templates
from himo_charts.scales import Scale, fit, fixed
from himo_charts.svg import Line, Svg, dots, line_chart, series_class

# By method ("" is the start), learning rate and seed: the file of a run.
Results = Mapping[tuple[str, float, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A loss: its name, its flags of `himo train`, and the method without its component loss."""

    label: str
    flags: Mapping[str, Any]
    baseline: str | None = None


# CLIP's loss is HiMo's with a component loss of weight 0, so that R is recorded.
METHODS = {
    "clip": Method("CLIP", {"preset": "paper", "tau": 0.9, "lambda_comp": 0.0}),
    "paper-0.9": Method("paper, τ = 0.9", {"preset": "paper", "tau": 0.9}, "clip"),
    "paper-0.6": Method("paper, τ = 0.6", {"preset": "paper", "tau": 0.6}, "clip"),
    "official-clip": Method("official, no component", {"preset": "official", "lambda_comp": 0.0}),
    "official": Method("official", {"preset": "official"}, "official-clip"),
}
# Decimals, and the unit.
MEASURES = {"HiMo@3": (1, "% of captions"), "HiMo@K": (3, "correlation"), "R@1": (1, "%")}
# Of Student's t distribution, two-sided 95 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Comparison:
    """A method against its baseline: means over seeds, and their paired difference.

    `interval` is half the width of the 95 % interval of the mean difference: the difference lies
    within it of the one measured. NaN for one seed.
    """

    method: str
    baseline: str
    rates: str  # "equal" or "own best"
    lr: float
    baseline_lr: float
    measure: str
    mean: float
    baseline_mean: float
    difference: float
    interval: float
    seeds: int
    rank: float  # R at the end, mean over seeds
    baseline_rank: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if not abs(self.difference) > self.interval:  # NaN: one seed
            return "not separated"
        return "higher" if self.difference > 0 else "lower"


def comparisons(results: Results) -> list[Comparison]:
    """Every method that has a baseline, by measure: at each rate, and each at its own best one."""
    rates, found = rates_of(results), []
    for name, method in METHODS.items():
        base = method.baseline
        if base is None:
            continue
        for measure in MEASURES:
            found += [_compare(results, "equal", measure, (name, lr), (base, lr)) for lr in rates]
            best = [(which, best_rate(results, which, measure)) for which in (name, base)]
            found.append(_compare(results, "own best", measure, *best))
    return found


def rates_of(results: Results) -> list[float]:
    return sorted({lr for method, lr, _ in results if method})


def seeds_of(results: Results) -> list[int]:
    return sorted({seed for _, _, seed in results})


def values(results: Results, method: str, lr: float, *keys: str) -> list[float]:
    """A number of every seed's run, by its keys."""
    found = []
    for seed in seeds_of(results):
        value: Any = results[method, lr, seed]
        for key in keys:
            value = value[key]
        found.append(float(value))
    return found


def best_rate(results: Results, method: str, measure: str) -> float:
    """The rate with the highest mean on the scenes to choose with, which are not compared on."""
    return max(
        rates_of(results), key=lambda lr: mean(values(results, method, lr, "choose", measure))
    )


def paired(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean difference, and half the width of its 95 % interval by Student's t."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    if count == 1:
        return differences[0], math.nan
    # Rounding removes the noise of float64; adding 0.0 makes a -0.0 positive.
    return round(mean(differences), 9) + 0.0, _T[count - 1] * stdev(differences) / math.sqrt(count)


def _compare(
    results: Results,
    rates: str,
    measure: str,
    first: tuple[str, float],
    second: tuple[str, float],
) -> Comparison:
    ours, base = (values(results, *of, "compare", measure) for of in (first, second))
    ranks = [mean(values(results, *of, "rank")) for of in (first, second)]
    return Comparison(
        *(first[0], second[0], rates, first[1], second[1], measure, mean(ours), mean(base)),
        *(*paired(ours, base), len(ours), *ranks),
    )


def comparisons_csv(results: Results) -> str:
    """A line for each comparison."""
    rows = [vars(one) for one in comparisons(results)]
    return _csv([*rows[0]], [list(row.values()) for row in rows])


def runs_csv(results: Results) -> str:
    """A line for each run, the starts included, with R at its end."""
    rows = [
        [method or "start", f"{lr:g}", seed, run["rank"], *(run["compare"][m] for m in MEASURES)]
        for (method, lr, seed), run in results.items()
    ]
    return _csv(["method", "lr", "seed", "rank", *MEASURES], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])
    return buffer.getvalue()


def effect_page(results: Results, now: datetime) -> str:
    """The page: each measure over the rates, and the comparisons in words and numbers."""
    found = comparisons(results)
    return templates.render(
        "effect.html",
        series_class=series_class,
        methods=[method.label for method in METHODS.values()],
        sections=[
            {
                "name": measure,
                "found": [_sentence(one) for one in found if _is_best(one, measure)],
                "chart": _chart(results, measure),
                "means": _means(results, MEASURES[measure][0], "compare", measure),
                "differences": _differences(found, measure),
            }
            for measure in MEASURES
        ],
        seeds=len(seeds_of(results)),
        ranks=_means(results, 0, "rank"),
        rates=[f"{lr:g}" for lr in rates_of(results)],
        now=now,
    )


def _means(results: Results, decimals: int, *keys: str) -> list[list[str]]:
    """A row for each method: means over seeds, by rate."""
    rates = rates_of(results)
    return [
        [
            METHODS[name].label,
            *(fixed(mean(values(results, name, lr, *keys)), decimals) for lr in rates),
        ]
        for name in METHODS
    ]


def _differences(found: Sequence[Comparison], measure: str) -> list[list[str]]:
    """A row for each method with a baseline: the difference at the best rates, then at each."""
    rows: dict[str, list[str]] = {}
    for one in found:
        if one.measure == measure:
            row = rows.setdefault(one.method, [_pair(one)])
            marks = {"higher": " ↑", "lower": " ↓"}
            cell = _difference(one) + marks.get(one.verdict, "")
            if one.rates == "own best":
                row.insert(1, f"{cell} ({one.lr:g}, {one.baseline_lr:g})")
            else:
                row.append(cell)
    return list(rows.values())


def _pair(one: Comparison) -> str:
    return f"{METHODS[one.method].label} against {METHODS[one.baseline].label}"


def _difference(one: Comparison) -> str:
    decimals = MEASURES[one.measure][0]
    return f"{fixed(one.difference, decimals)} ± {fixed(one.interval, decimals)}"


def _is_best(one: Comparison, measure: str) -> bool:
    return one.measure == measure and one.rates == "own best"


def _sentence(one: Comparison) -> str:
    words = {"not separated": "not separated from"}.get(one.verdict, f"{one.verdict} than")
    label, base = METHODS[one.method].label, METHODS[one.baseline].label
    return f"{label} is {words} {base}: {_difference(one)}."


def _chart(results: Results, measure: str) -> Svg:
    rates, (decimals, unit) = rates_of(results), MEASURES[measure]
    by_method = {
        name: [values(results, name, lr, "compare", measure) for lr in rates] for name in METHODS
    }
    x = Scale(rates[0] / 1.15, rates[-1] * 1.15, log=True)
    y = fit(value for of in by_method.values() for at in of for value in at) or Scale(0, 1)
    lines, over, told = [], "", []
    for index, (name, of) in enumerate(by_method.items()):
        lines.append(Line(index, rates, [mean(at) for at in of]))
        places = [
            (x.at(lr), y.at(value), f"{METHODS[name].label}, {lr:g}: {fixed(value, decimals)}")
            for lr, at in zip(rates, of, strict=True)
            for value in at
        ]
        over += dots(index, places, 2.5)
        means = ", ".join(fixed(mean(at), decimals) for at in of)
        told.append(f"{METHODS[name].label}: {means}")
    return line_chart(
        *(f"effect-{measure.replace('@', '-at-')}", f"{measure} over the learning rate"),
        *("; ".join(told), x, y, lines),
        x_label="learning rate of fine-tuning",
        y_label=unit,
        over=over,
        x_ticks=rates[::2],  # as many as a phone has room for
        height="260",
    )
