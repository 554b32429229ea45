"""The section of a report on HiMo@2, HiMo@3 and HiMo@K: does similarity grow with the caption?"""

import math
from collections.abc import Sequence
from typing import Any

from himo.report.figures import Figure, Table, bar_figure
from himo.report.runs import Run, as_numbers, lookup, plural
from himo_charts.scales import Scale, finite_only, fit, fixed, is_finite, number
from himo_charts.svg import Line, dots, line_chart

HIMO = ("HiMo@2", "HiMo@3", "HiMo@K")
_GROUPS = 6  # of captions by their words
# Share of random orders of K scores that rise throughout, in percent: 100 / K!
_RANDOM_ORDER = {"HiMo@2": 50.0, "HiMo@3": 100 / 6}


def himo(runs: Sequence[Run]) -> dict[str, Any] | None:
    """`figures` and a `table` that says what was left out; None where no run has a measure.

    The figures are HiMo@2 and @3 as bars, HiMo@K likewise, and HiMo@K by segments and by words.
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
        _rho_by_words(runs),
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
    """The mean correlation of the captions of each number of segments."""
    found = [_correlations(run, "K") for run in runs]
    lengths = sorted({k for of_run in found for k, _ in of_run})
    return _rho_figure(
        runs,
        found,
        [(k, k) for k in lengths],
        "rho-by-k",
        "Correlation by number of segments",
        "segments of the caption, K",
        x_ticks=lengths[:: max(1, math.ceil(len(lengths) / 8))],
    )


def _rho_by_words(runs: Sequence[Run]) -> Figure | None:
    """The mean correlation of captions of similar length; each group has about as many."""
    found = [_correlations(run, "words") for run in runs]
    words = sorted(count for of_run in found for count, _ in of_run)
    if not words:
        return None
    ends = sorted({words[(len(words) * part - 1) // _GROUPS] for part in range(1, _GROUPS + 1)})
    starts = [words[0], *(end + 1 for end in ends)]
    return _rho_figure(
        runs,
        found,
        list(zip(starts, ends, strict=False)),
        "rho-by-words",
        "Correlation by length of the caption",
        "words of the caption",
    )


def _rho_figure(
    runs: Sequence[Run],
    found: Sequence[Sequence[tuple[int, float]]],
    groups: Sequence[tuple[int, int]],
    ident: str,
    title: str,
    x_label: str,
    x_ticks: Sequence[float] | None = None,
) -> Figure | None:
    """Mean correlations over groups of captions; None where there are fewer than two.

    Args:
        found: for each run the captions, as (size, correlation).
        groups: the smallest and the largest size of each, ascending.
        x_ticks: as in `line_chart`.
    """
    means = [[_group_mean(of_run, *group) for group in groups] for of_run in found]
    y = fit((mean for of_run in means for mean, _ in of_run), margin=0.12)
    if y is None or len(groups) < 2:
        return None
    middles = [(low + high) / 2 for low, high in groups]
    margin = 0.05 * (middles[-1] - middles[0])
    x = Scale(middles[0] - margin, middles[-1] + margin)
    names = [str(low) if low == high else f"{low}–{high}" for low, high in groups]
    lines, marks = [], ""
    for index, (run, of_run) in enumerate(zip(runs, means, strict=True)):
        shown = [
            (middle, name, mean, count)
            for middle, name, (mean, count) in zip(middles, names, of_run, strict=True)
            if mean is not None
        ]
        lines.append(Line(index, [place for place, *_ in shown], [mean for *_, mean, _ in shown]))
        places = []
        for place, name, mean, count in shown:
            told = f"{run.label}, {name}: mean ρ {number(mean)}, {plural(count, 'caption')}"
            places.append((x.at(place), y.at(mean), told))
        marks += dots(index, places)
    chart = line_chart(
        ident,
        title,
        f"Mean correlation of length and similarity over {x_label}.",
        x,
        y,
        lines,
        x_label=x_label,
        y_label="mean ρ",
        over=marks,
        x_ticks=x_ticks,
    )
    rows = []
    for place, name in enumerate(names):
        cells = (of_run[place] for of_run in means)
        rows.append([name, *(c for mean, count in cells for c in (number(mean), f"{count:,}"))])
    head = [x_label, *(h for run in runs for h in (run.label, "captions"))]
    return Figure(title, chart, Table(head, rows))


def _group_mean(
    captions: Sequence[tuple[int, float]], low: int, high: int
) -> tuple[float | None, int]:
    """The mean correlation of the captions whose size is from low to high, and their number."""
    values = [rho for size, rho in captions if low <= size <= high]
    return (sum(values) / len(values) if values else None), len(values)


def _correlations(run: Run, size: str) -> list[tuple[int, float]]:
    """The size of each caption, K or words, and its correlation."""
    sizes, rhos = (as_numbers(lookup(run.evaluation, "histogram", n)) for n in (size, "rho"))
    if not sizes or not rhos or len(sizes) != len(rhos):
        return []
    pairs = zip(sizes, rhos, strict=True)
    return [(int(at), rho) for at, rho in pairs if math.isfinite(at) and math.isfinite(rho)]


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
