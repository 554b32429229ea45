"""The section of a report on HiMo@2, HiMo@3 and HiMo@K: does similarity grow with the caption?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from himo.report.figures import Figure, Table
from himo.report.runs import Run, as_numbers, lookup, plural
from himo_charts.scales import Scale, finite_only, fit, fixed, is_finite, number
from himo_charts.svg import Line, bar_chart, dots, line_chart

HIMO = ("HiMo@2", "HiMo@3", "HiMo@K")
# Share of random orders of K scores that rise throughout, in percent: 100 / K!
_RANDOM_ORDER = {"HiMo@2": 50.0, "HiMo@3": 100 / 6}


@dataclass(frozen=True)
class Monotonicity:
    """HiMo@2 and @3 as bars, HiMo@K likewise and by K, and a table with what was left out."""

    figures: Sequence[Figure]
    table: Table


def himo(runs: Sequence[Run]) -> Monotonicity | None:
    """What the runs have of HiMo@K; None where that is nothing."""
    found = list(dict.fromkeys(name for run in runs for name in _measures(run)))
    found.sort(key=lambda name: HIMO.index(name) if name in HIMO else len(HIMO))
    if not found:
        return None
    shares = [name for name in found if name in _RANDOM_ORDER]
    means = [name for name in found if name not in (*_RANDOM_ORDER, "COLA")]
    charts = []
    if shares:
        charts.append(_himo_chart(runs, shares, "Similarity always rises", "% of captions", 1))
    if means:
        charts.append(_himo_chart(runs, means, "Similarity and length", "correlation ρ", 2))
    if by_length := _rho_by_k(runs):
        charts.append(by_length)
    rows = []
    for run in runs:
        cells = []
        for name in found:
            value = _himo(run, name)
            cells += [
                fixed(value, 4 if name in means else 2)
                + (" %" if name not in means and is_finite(value) else ""),
                number(_himo(run, name, "used")),
                number(_himo(run, name, "left_out")),
            ]
        rows.append([run.label, *cells])
    head = ["", *(h for name in found for h in (name, "used", "left out"))]
    rules = {
        rule
        for run in runs
        if isinstance(rule := lookup(run.evaluation, "protocol", "sentence_rule"), str)
    }
    note = f"Sentences are split at {' or '.join(sorted(rules))}" if rules else ""
    return Monotonicity(charts, Table(head, rows, note))


def _rho_by_k(runs: Sequence[Run]) -> Figure | None:
    """The mean correlation of the captions of each length, from the histogram of eval.json."""
    means: list[dict[int, tuple[float, int]]] = []
    for run in runs:
        lengths, rhos = (as_numbers(lookup(run.evaluation, "histogram", n)) for n in ("K", "rho"))
        groups: dict[int, list[float]] = {}
        if lengths and rhos and len(lengths) == len(rhos):
            for length, rho in zip(lengths, rhos, strict=True):
                if math.isfinite(length) and math.isfinite(rho):
                    groups.setdefault(int(length), []).append(rho)
        means.append({k: (sum(of_k) / len(of_k), len(of_k)) for k, of_k in sorted(groups.items())})
    lengths_shown = sorted({k for groups in means for k in groups})
    y = fit((mean for groups in means for mean, _ in groups.values()), margin=0.12)
    if y is None or len(lengths_shown) < 2:
        return None
    x = Scale(lengths_shown[0] - 0.3, lengths_shown[-1] + 0.3)
    lines, marks = [], ""
    for index, (run, by_k) in enumerate(zip(runs, means, strict=True)):
        lines.append(Line(index, list(by_k), [mean for mean, _ in by_k.values()]))
        marks += dots(
            index,
            [
                (
                    x.at(k),
                    y.at(mean),
                    f"{run.label}, K = {k}: mean ρ {number(mean)}, {plural(count, 'caption')}",
                )
                for k, (mean, count) in by_k.items()
            ],
        )
    title = "Correlation by number of segments"
    chart = line_chart(
        "rho-by-k",
        title,
        "Mean correlation of length and similarity for captions of K segments.",
        x,
        y,
        lines,
        x_label="segments of the caption, K",
        over=marks,
        x_ticks=lengths_shown[:: math.ceil(len(lengths_shown) / 8)],
    )
    table = Table(
        ["K", *(h for run in runs for h in (run.label, "captions"))],
        [
            [
                str(k),
                *(
                    cell
                    for groups in means
                    for cell in (
                        (number(groups[k][0]), f"{groups[k][1]:,}") if k in groups else ("–", "0")
                    )
                ),
            ]
            for k in lengths_shown
        ],
    )
    return Figure(title, "mean ρ", chart, table)


def _measures(run: Run) -> list[str]:
    """The names under `himo` in eval.json that have a value or say that there is none."""
    entries = lookup(run.evaluation, "himo")
    names = []
    if isinstance(entries, dict):
        names = [name for name, entry in entries.items() if isinstance(entry, dict)]
    if isinstance(lookup(run.evaluation, "cola"), dict):
        names.append("COLA")
    return names


def _himo_chart(
    runs: Sequence[Run], names: Sequence[str], title: str, unit: str, decimals: int
) -> Figure:
    bars = [[_himo(run, name) for name in names] for run in runs]
    if not finite_only(value for values in bars for value in values):
        return Figure(title, unit, missing=f"No run has a value of {' or '.join(names)}.")
    chance = [_RANDOM_ORDER.get(name) for name in names]
    y = fit([*(v for values in bars for v in values), *chance], zero=True, margin=0.08)
    if y is None:
        return Figure(title, unit, missing="The values are not numbers that can be drawn.")
    chart = bar_chart(
        names[0].replace("@", "-").lower(),
        title,
        "; ".join(
            f"{run.label}: "
            + ", ".join(f"{n} {fixed(v, decimals)}" for n, v in zip(names, values, strict=True))
            for run, values in zip(runs, bars, strict=True)
        ),
        names,
        bars,
        y,
        chance=chance,
        decimals=decimals,
    )
    table = Table(
        ["", *names],
        [
            [run.label, *(fixed(value, decimals + 1) for value in values)]
            for run, values in zip(runs, bars, strict=True)
        ],
    )
    guess = ", ".join(f"{n} {number(c, 3)} %" for n, c in zip(names, chance, strict=True) if c)
    caption = f"Dashed: scores in random order ({guess})." if guess else ""
    return Figure(title, unit, chart, table, caption=caption)


def _himo(run: Run, name: str, key: str = "value") -> float | None:
    """A number of a measure of HiMo@K, or of COLA, which stands beside them."""
    if name == "COLA":
        return run.result("cola", "accuracy" if key == "value" else key)
    return run.result("himo", name, key)
