"""The section of a report on HiMo@2, HiMo@3 and HiMo@K: does similarity grow with the caption?"""

import math
from collections.abc import Sequence
from typing import Any

from himo.report.figures import Figure, Table, bar_figure
from himo.report.runs import Run, as_numbers, lookup, plural
from himo_charts.scales import Scale, finite_only, fit, fixed, is_finite, number
from himo_charts.svg import Line, dots, line_chart

HIMO = ("HiMo@2", "HiMo@3", "HiMo@K")
# Share of random orders of K scores that rise throughout, in percent: 100 / K!
_RANDOM_ORDER = {"HiMo@2": 50.0, "HiMo@3": 100 / 6}


def himo(runs: Sequence[Run]) -> dict[str, Any] | None:
    """`figures` and a `table` that says what was left out; None where no run has a measure.

    The figures are HiMo@2 and @3 as bars, HiMo@K likewise, and HiMo@K by length.
    """
    found = list(dict.fromkeys(name for run in runs for name in _measures(run)))
    found.sort(key=lambda name: HIMO.index(name) if name in HIMO else len(HIMO))
    if not found:
        return None
    shares = [name for name in found if name in _RANDOM_ORDER]
    means = [name for name in found if name not in (*_RANDOM_ORDER, "COLA")]
    figures = [
        _bars(runs, shares, "Similarity always rises", "% of captions", 1) if shares else None,
        _bars(runs, means, "Similarity and length", "correlation ρ", 2) if means else None,
        _rho_by_k(runs),
    ]
    rows = []
    for run in runs:
        cells = []
        for name in found:
            value, is_mean = _himo(run, name), name in means
            percent = "" if is_mean or not is_finite(value) else " %"
            cells += [fixed(value, 4 if is_mean else 2) + percent]
            cells += [number(_himo(run, name, key)) for key in ("used", "left_out")]
        rows.append([run.label, *cells])
    head = ["", *(h for name in found for h in (name, "used", "left out"))]
    protocols = (lookup(run.evaluation, "protocol", "sentence_rule") for run in runs)
    rules = {rule for rule in protocols if isinstance(rule, str)}
    note = f"How sentences are cut: {' or '.join(sorted(rules))}" if rules else ""
    return {
        "figures": [figure for figure in figures if figure is not None],
        "table": Table(head, rows, note),
    }


def _rho_by_k(runs: Sequence[Run]) -> Figure | None:
    """The mean correlation of the captions of each length, from the histogram of eval.json."""
    means = [_means_by_k(run) for run in runs]
    lengths = sorted({k for by_k in means for k in by_k})
    y = fit((mean for by_k in means for mean, _ in by_k.values()), margin=0.12)
    if y is None or len(lengths) < 2:
        return None
    x = Scale(lengths[0] - 0.3, lengths[-1] + 0.3)
    lines, marks = [], ""
    for index, (run, by_k) in enumerate(zip(runs, means, strict=True)):
        lines.append(Line(index, list(by_k), [mean for mean, _ in by_k.values()]))
        places = []
        for k, (mean, count) in by_k.items():
            told = f"{run.label}, K = {k}: mean ρ {number(mean)}, {plural(count, 'caption')}"
            places.append((x.at(k), y.at(mean), told))
        marks += dots(index, places)
    title = "Correlation by number of segments"
    chart = line_chart(
        "rho-by-k",
        title,
        "Mean correlation of length and similarity for captions of K segments.",
        x,
        y,
        lines,
        x_label="segments of the caption, K",
        y_label="mean ρ",
        over=marks,
        x_ticks=lengths[:: math.ceil(len(lengths) / 8)],
    )
    rows = []
    for k in lengths:
        cells = [by_k.get(k, (None, 0)) for by_k in means]
        rows.append([str(k), *(c for mean, count in cells for c in (number(mean), f"{count:,}"))])
    head = ["K", *(h for run in runs for h in (run.label, "captions"))]
    return Figure(title, chart, Table(head, rows))


def _means_by_k(run: Run) -> dict[int, tuple[float, int]]:
    """For each K, ascending, the mean correlation and the number of captions."""
    lengths, rhos = (as_numbers(lookup(run.evaluation, "histogram", n)) for n in ("K", "rho"))
    groups: dict[int, list[float]] = {}
    if lengths and rhos and len(lengths) == len(rhos):
        for length, rho in zip(lengths, rhos, strict=True):
            if math.isfinite(length) and math.isfinite(rho):
                groups.setdefault(int(length), []).append(rho)
    return {k: (sum(of_k) / len(of_k), len(of_k)) for k, of_k in sorted(groups.items())}


def _measures(run: Run) -> list[str]:
    """The names under `himo` in eval.json that have a value or say that there is none."""
    entries = lookup(run.evaluation, "himo")
    names = []
    if isinstance(entries, dict):
        names = [name for name, entry in entries.items() if isinstance(entry, dict)]
    if isinstance(lookup(run.evaluation, "cola"), dict):
        names.append("COLA")
    return names


def _bars(
    runs: Sequence[Run], names: Sequence[str], title: str, y_label: str, decimals: int
) -> Figure:
    bars = [[_himo(run, name) for name in names] for run in runs]
    if not finite_only(value for values in bars for value in values):
        return Figure(title, missing=f"No run has a value of {' or '.join(names)}.")
    chance = [_RANDOM_ORDER.get(name) for name in names]
    y = fit([*(v for values in bars for v in values), *chance], zero=True, margin=0.08)
    if y is None:
        return Figure(title, missing="The values are not numbers that can be drawn.")
    guess = ", ".join(f"{n} {number(c, 3)} %" for n, c in zip(names, chance, strict=True) if c)
    caption = f"Dashed: scores in random order ({guess})." if guess else ""
    return bar_figure(
        Figure(title, caption=caption),
        names[0].replace("@", "-").lower(),
        title,
        runs,
        names,
        bars,
        y,
        lambda value: fixed(value, decimals),
        y_label=y_label,
        chance=chance,
        decimals=decimals,
    )


def _himo(run: Run, name: str, key: str = "value") -> float | None:
    """A number of a measure of HiMo@K, or of COLA, which is shown with them."""
    if name == "COLA":
        return run.result("cola", "accuracy" if key == "value" else key)
    return run.result("himo", name, key)
