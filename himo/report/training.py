"""The sections of a report that come from metrics.jsonl: losses, spectrum, rank, optimisation."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from himo.report.evaluation import DIRECTIONS
from himo.report.figures import Figure, Table
from himo.report.runs import Run, Spectrum, as_number
from himo.report.series import quantile, smoothed, spread, thin, value_at
from himo_charts.scales import Scale, finite_only, fit, fixed, number
from himo_charts.svg import Line, dots, label, line_chart, rule, series_class
from himo_kernels.nn import PRESETS

_PRESET_NAMES = list(PRESETS)  # a list: the value in a file need not be hashable
_CELLS = 40  # of the table below a chart, at least 8 rows; all lines are in report.csv
_RANKS = 8  # of one caption, evenly spread over the validations
_POINTS = 640  # of all curves of one chart together


class _Series(NamedTuple):
    """One column of one run, in the unit shown; None where a step did not log it."""

    run: int
    label: str
    step: Sequence[int]
    values: Sequence[float | None]


def losses(runs: Sequence[Run]) -> list[Figure]:
    """The terms of the loss for all runs, and the totals: a chart for each kind of loss."""
    figures = [
        curve_chart(runs, "contrastive_loss", "Contrastive loss", "image and caption, nats"),
        curve_chart(runs, "component_loss", "Component loss", "image and components, nats"),
    ]
    # Totals of different losses are sums of different terms, which no axis makes comparable.
    kinds: dict[str, set[int]] = {}
    for index, run in enumerate(runs):
        if run.has("loss"):
            kinds.setdefault(str(run.setting("loss")), set()).add(index)
    for place, (kind, of_kind) in enumerate(kinds.items() or [("", set())]):
        title = f"Total loss, {kind}" if len(kinds) > 1 else "Total loss"
        ident = f"loss-{place}"
        figures.append(curve_chart(runs, "loss", title, "nats", only=of_kind, ident=ident))
    return figures


def validation(runs: Sequence[Run]) -> list[Figure]:
    """R@1 both ways on held-out pairs, with the best epoch; nothing where none was validated."""
    charts = [(f"val_{way}_R@1", f"R@1, {title.lower()}") for way, title in DIRECTIONS]
    if not any(run.has(column) for column, _ in charts for run in runs):
        return []
    found = [
        (index, best) for index, run in enumerate(runs) if (best := best_line(run)) is not None
    ]
    epochs = (f"{runs[i].label} {number(runs[i].column('epoch')[at])}" for i, at in found)
    told = f"Ringed: the epoch of the best mean of both R@1 ({', '.join(epochs)})."
    return [
        curve_chart(
            *(runs, column, title, "R@1, % of queries"),
            zero=True,
            smooth=False,
            sparse=True,
            ringed=found,
            caption=told if found else "",
        )
        for column, title in charts
    ]


def predictions(runs: Sequence[Run]) -> Table | None:
    """The rank of a few captions in each validation; None where no run has any."""
    several = len(runs) > 1
    rows = [
        [
            f"{run.label}: {followed.image}" if several else followed.image,
            followed.caption,
            " → ".join(f"{followed.ranks[at]:,}" for at in spread(len(followed.ranks), _RANKS)),
            "its own" if followed.best == followed.caption else followed.best,
        ]
        for run in runs
        for followed in run.followed
    ]
    head = ["image", "its caption", "rank of its caption", "best caption at the end"]
    note = "Of the first held-out images, among all held-out captions, from epoch to epoch."
    return Table(head, rows, note) if rows else None


def best_line(run: Run) -> int | None:
    """The index of the first line with the highest mean of R@1 both ways, if any has both."""
    lines = zip(*(run.column(f"val_{way}_R@1") for way, _ in DIRECTIONS), strict=True)
    sums = {at: sum(r) for at, line in enumerate(lines) if len(r := finite_only(line)) == 2}
    return max(sums, key=sums.__getitem__, default=None)


def optimisation(runs: Sequence[Run]) -> list[Figure]:
    """Small charts of the optimizer and of the machine's speed."""
    charts = (
        ("lr", "Learning rate", "learning rate", {"zero": True, "smooth": False}),
        ("grad_norm", "Gradient norm", "L2 norm before clipping", {"log": True}),
        ("logit_scale", "Logit scale", "1 / temperature", {"smooth": False}),
        ("samples_per_s", "Throughput", "samples per second", {"zero": True}),
        ("step_time_s", "Time of a step", "milliseconds", {"zero": True, "factor": 1e3}),
        ("data_time_s", "Waiting for data", "milliseconds a step", {"zero": True, "factor": 1e3}),
    )
    return [
        curve_chart(runs, column, title, y_label, **options)
        for column, title, y_label, options in charts
    ]


def curve_chart(
    runs: Sequence[Run],
    column: str,
    title: str,
    y_label: str,
    *,
    zero: bool = False,
    log: bool = False,
    smooth: bool = True,
    style: str = "solid",
    sparse: bool = False,
    factor: float = 1.0,
    only: Collection[int] | None = None,
    ringed: Sequence[tuple[int, int]] = (),
    ident: str = "",
    caption: str = "",
) -> Figure:
    """One column of metrics.jsonl over the training steps of all runs.

    Args:
        zero: starts the vertical axis at zero.
        log: makes it logarithmic where the values span several decades.
        smooth: draws a moving average over the values as logged.
        style: of `Line`, where nothing is smoothed: "step" for whole numbers.
        sparse: joins the steps that logged the column, where most lines do not have it.
        factor: to the unit shown.
        only: the runs that are drawn, by index; None draws all.
        ringed: marked values, as (run, index of its line).
        ident: unique on the page; made from the column by default.
        caption: a sentence below the chart.
    """
    shown = [
        _series(index, run, column, factor, sparse)
        for index, run in enumerate(runs)
        if run.has(column) and (only is None or index in only)
    ]
    if not shown:
        return Figure(title, missing=f"No run logged {column}.")
    budget = max(40, _POINTS // (len(shown) * (2 if smooth else 1)))
    lines, bulk = _curves(shown, budget, smooth, style)
    x = fit((step for series in shown for step in series.step), margin=0)
    y = fit(bulk, zero=zero, log=log)
    if x is None or y is None:
        return Figure(title, missing=f"No value of {column} is a finite number.")
    outside = sum(not y.holds(v) for series in shown for v in finite_only(series.values))
    notes = [caption] if caption else []
    if outside:
        values = "value lies" if outside == 1 else "values lie"
        notes.append(f"{outside:,} logged {values} beyond the axis.")
    if only is None and (absent := [run.label for run in runs if not run.has(column)]):
        notes.append(f"Not logged by {', '.join(absent)}.")
    ends = [number(series.values[-1]) for series in shown]
    at_end = ", ".join(f"{s.label} {end}" for s, end in zip(shown, ends, strict=True))
    rows = _rows(shown)
    chart = line_chart(
        ident or column.replace("_", "-").replace("@", ""),
        title,
        f"{title} over training steps. At the end: {at_end}",
        x,
        y,
        lines,
        x_label="step",
        y_label=y_label,
        over="".join(_ring(runs[run], run, at, column, x, y) for run, at in ringed),
        x_ticks=[tick for tick in x.ticks() if tick.is_integer()],
        hits=[(step, _hit(shown, step, cells)) for step, cells in rows],
    )
    table = Table(
        ["step", *(series.label for series in shown)],
        [[f"{step:,}", *cells] for step, cells in rows],
        "The value logged last at or before each step; every line is in the csv file.",
    )
    marks = [(series.run, end) for series, end in zip(shown, ends, strict=True)]
    return Figure(title, chart, table, ends=marks, caption=" ".join(notes))


def _series(index: int, run: Run, column: str, factor: float, sparse: bool) -> _Series:
    values = [None if value is None else factor * value for value in run.column(column)]
    logged = [at for at, value in enumerate(values) if value is not None or not sparse]
    return _Series(index, run.label, [run.step[at] for at in logged], [values[at] for at in logged])


def _ring(run: Run, index: int, at: int, column: str, x: Scale, y: Scale) -> str:
    """A ring around a value of a run, with a line down to its step."""
    step, value = run.step[at], run.column(column)[at]
    if value is None or not y.holds(value):
        return ""
    place, told = (x.at(step), y.at(value)), f"{run.label}: best at step {step:,}"
    down = rule("chosen", x=place[0], top=place[1])
    ring = dots(index, [(*place, told)], 5, "best")
    return f'<g class="{series_class(index)}">{down}</g>{ring}'


def _curves(
    shown: Sequence[_Series], budget: int, smooth: bool, style: str
) -> tuple[list[Line], list[float]]:
    """The lines of a chart, and the values that its vertical axis has to hold: no lone spikes."""
    lines: list[Line] = []
    bulk: list[float] = []
    for series in shown:
        logged, count = finite_only(series.values), len(series.values)
        if not smooth or count <= 30:
            lines.append(Line(series.run, *thin(series.step, series.values, budget), style))
            bulk += logged
            continue
        places = spread(count, budget)
        average = smoothed(series.values, max(4, count // 15), places)
        lines.append(Line(series.run, *thin(series.step, series.values, budget), "faint"))
        lines.append(Line(series.run, [series.step[at] for at in places], average))
        bulk += finite_only(average)
        bulk += [quantile(logged, 0.005), quantile(logged, 0.995)] if logged else []
    return lines, bulk


def _rows(shown: Sequence[_Series]) -> list[tuple[int, list[str]]]:
    """Some steps, evenly spread, each with the value of every run there."""
    steps = sorted({step for series in shown for step in series.step})
    chosen = [steps[i] for i in spread(len(steps), _rows_of(len(shown)))]
    return [(step, [number(value_at(s.step, s.values, step)) for s in shown]) for step in chosen]


def _hit(shown: Sequence[_Series], step: int, cells: Sequence[str]) -> str:
    """What a pointer reads near a step."""
    values = (f"{s.label}: {cell}" for s, cell in zip(shown, cells, strict=True))
    return "\n".join([f"step {step:,}", *values])


def _rows_of(runs: int) -> int:
    return max(8, min(16, _CELLS // runs))


def spectrum_charts(runs: Sequence[Run]) -> list[Figure]:
    """The cumulative spectrum of the text features with tau and the rank, then the rank by step."""
    ranks = curve_chart(
        runs, "rank", "Rank kept", "components", zero=True, smooth=False, style="step"
    )
    title = "Explained variance of the text features"
    last = [(index, run, run.spectra[-1]) for index, run in enumerate(runs) if run.spectra]
    if not last:
        return [Figure(title, missing="No run logged a spectrum."), ranks]
    kept = [chosen_rank(run, spectrum) for _, run, spectrum in last]
    length = _length([spectrum for _, _, spectrum in last], [rank for rank in kept if rank])
    x, y = Scale(0, length), Scale(0, 1.04)
    lines: list[Line] = []
    told, over = [], ""
    for tau in sorted({tau for tau in map(_tau, runs) if tau is not None}):
        over += rule("tau", y=y.at(tau))
        over += label(1, y.at(tau), f"τ = {tau:g}", "", dy=16, anchor="end")
    for place, ((index, run, final), rank) in enumerate(zip(last, kept, strict=True)):
        if run.spectra[0] is not final:
            lines.append(Line(index, *_cumulative(run.spectra[0], length), "dashed"))
        lines.append(Line(index, *_cumulative(final, length)))
        if rank is None:
            told.append(f"{run.label}: no rank chosen")
            continue
        told.append(f"{run.label}: {rank} components kept")
        share = final.cumulative()[rank - 1]
        dot = f"{run.label}: {rank} components hold {share:.1%} of the variance"
        over += (
            f'<g class="{series_class(index)}">{rule("chosen", x=x.at(rank), top=y.at(share))}'
            f"{dots(index, [(x.at(rank), y.at(share), dot)], 5)}"
            f"{label(x.at(rank), 0, f'R = {rank}', 'run', dx=7, dy=-10 - 16 * place)}</g>"
        )
    steps = ", ".join(f"{run.label} {run.spectra[0].step:,} and {s.step:,}" for _, run, s in last)
    caption = f"Dotted: first batch logged; solid: last (steps: {steps})."
    if absent := [run.label for run in runs if not run.spectra]:
        caption += f" Not logged by {', '.join(absent)}."
    chart = line_chart(
        "spectrum",
        title,
        f"Share of the variance held by the first components. {'; '.join(told)}",
        x,
        y,
        lines,
        x_label="components",
        y_label="cumulative share",
        over=over,
        x_ticks=[tick for tick in x.ticks() if tick.is_integer()],
    )
    figure = Figure(title, chart, _spectrum_table(last), wide=True, caption=caption)
    return [figure, ranks]


def chosen_rank(run: Run, spectrum: Spectrum) -> int | None:
    """The rank logged with a spectrum, else the smallest that reaches the run's tau.

    None for a run without projection, as with the plain CLIP loss.
    """
    if spectrum.rank is not None:
        return spectrum.rank
    tau = _tau(run)
    return None if tau is None else spectrum.reaching(tau)


def _tau(run: Run) -> float | None:
    """The threshold a run used; None where its loss has none."""
    if run.setting("loss") != "himo":
        return None
    tau, preset = as_number(run.setting("tau")), run.setting("preset")
    if tau is None and preset in _PRESET_NAMES:
        tau = PRESETS[preset]["variance_threshold"]
    return tau if tau is not None and 0 < tau <= 1 else None


def _length(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    """How many components to draw: until all but a hundredth is held, and well past the ranks."""
    ends = [spectrum.reaching(0.99) or len(spectrum.ratios) for spectrum in spectra]
    longest = max(len(spectrum.ratios) for spectrum in spectra)
    return max(2, min(longest, max([*ends, *(math.ceil(1.4 * rank) for rank in ranks)])))


def _cumulative(spectrum: Spectrum, length: int) -> tuple[list[float], list[float]]:
    sums = [0.0, *spectrum.cumulative()][: length + 1]
    return thin(list(range(len(sums))), sums, 100)


def _spectrum_table(last: Sequence[tuple[int, Run, Spectrum]]) -> Table:
    sums = [spectrum.cumulative() for _, _, spectrum in last]
    longest = max(map(len, sums))
    evenly = {i + 1 for i in spread(longest, _rows_of(len(last)))}
    rows = [
        [
            f"{place:,}",
            *(f"{fixed(100 * s[place - 1], 2)} %" if place <= len(s) else "–" for s in sums),
        ]
        for place in sorted(evenly | ({1, 2, 3, 5} & set(range(1, longest + 1))))
    ]
    head = ["components", *(run.label for _, run, _ in last)]
    return Table(head, rows, "Cumulative share of the variance, last batch logged.")
