"""The sections of a report that come from metrics.jsonl: losses, spectrum, rank, optimisation."""

import math
from collections.abc import Sequence
from dataclasses import replace

from himo.report.evaluation import DIRECTIONS
from himo.report.figures import Figure, Table
from himo.report.runs import Run, Spectrum, as_number
from himo.report.series import quantile, smoothed, spread, thin, value_at
from himo_charts.scales import Scale, finite_only, fit, fixed, number
from himo_charts.svg import Line, dots, label, line_chart, rule, series_class
from himo_kernels.nn import PRESETS

_PRESET_NAMES = list(PRESETS)  # a list: what a file holds need not be hashable
_CELLS = 40  # of the table below a chart, at least 8 rows; all lines are in report.csv
_POINTS = 640  # of all curves of one chart together


def losses(runs: Sequence[Run]) -> list[Figure]:
    """The three losses of all runs as charts."""
    return [
        curve_chart(runs, column, title, "nats")
        for column, title in (
            ("contrastive_loss", "Contrastive loss"),
            ("component_loss", "Component loss"),
            ("loss", "Total loss"),
        )
    ]


def validation(runs: Sequence[Run]) -> list[Figure]:
    """R@1 both ways on held-out pairs as charts; nothing where no run was validated."""
    charts = [(f"val_{way}_R@1", f"R@1, {title.lower()}") for way, title in DIRECTIONS]
    if not any(run.has(column) for column, _ in charts for run in runs):
        return []
    return [
        curve_chart(runs, column, title, "% of queries", zero=True, smooth=False, sparse=True)
        for column, title in charts
    ]


def optimisation(runs: Sequence[Run]) -> list[Figure]:
    """Small multiples of what the optimizer and the machine did."""
    charts = (
        ("lr", "Learning rate", "", {"zero": True, "smooth": False}),
        ("grad_norm", "Gradient norm", "before clipping", {"log": True}),
        ("logit_scale", "Logit scale", "multiplier, 1 / temperature", {"smooth": False}),
        ("samples_per_s", "Throughput", "samples per second", {"zero": True}),
        ("step_time_s", "Time of a step", "milliseconds", {"zero": True, "factor": 1e3}),
        ("data_time_s", "Waiting for data", "milliseconds a step", {"zero": True, "factor": 1e3}),
    )
    return [
        curve_chart(runs, column, title, unit, **options) for column, title, unit, options in charts
    ]


def curve_chart(
    runs: Sequence[Run],
    column: str,
    title: str,
    unit: str,
    *,
    zero: bool = False,
    log: bool = False,
    smooth: bool = True,
    step: bool = False,
    sparse: bool = False,
    factor: float = 1.0,
) -> Figure:
    """One column of metrics.jsonl over the training steps of all runs.

    Args:
        zero: starts the vertical axis at zero.
        log: makes it logarithmic where the values span several decades.
        smooth: draws a moving average over the values as logged.
        step: draws stairs, for whole numbers.
        sparse: joins the steps at which it was logged, where most lines do not have it.
        factor: to the unit shown.
    """
    shown = [(index, run) for index, run in enumerate(runs) if run.has(column)]
    if not shown:
        return Figure(title, unit, missing=f"No run logged {column}.")
    if sparse:
        shown = [(index, _where_logged(run, column)) for index, run in shown]
    budget = max(40, _POINTS // (len(shown) * (2 if smooth else 1)))
    lines: list[Line] = []
    bulk: list[float] = []  # what the vertical axis has to hold: no lone spikes
    everything: list[float] = []
    for index, run in shown:
        values = [None if v is None else factor * v for v in run.column(column)]
        logged = finite_only(values)
        everything += logged
        if smooth and len(values) > 30:
            places = spread(len(values), budget)
            average = smoothed(values, max(4, len(values) // 15), places)
            lines.append(Line(index, *thin(run.step, values, budget), "faint"))
            lines.append(Line(index, [run.step[i] for i in places], average))
            bulk += finite_only(average)
            bulk += [quantile(logged, 0.005), quantile(logged, 0.995)] if logged else []
        else:
            lines.append(Line(index, *thin(run.step, values, budget), "step" if step else "solid"))
            bulk += logged
    x = fit((place for _, run in shown for place in run.step), margin=0)
    y = fit(bulk, zero=zero, log=log)
    if x is None or y is None:
        return Figure(title, unit, missing=f"No value of {column} is a finite number.")
    ends = [(index, number(_scaled(run.column(column)[-1], factor))) for index, run in shown]
    rows = _rows(shown, column, factor)
    outside = sum(not y.holds(value) for value in everything)
    notes = []
    if outside:
        notes.append(
            f"{outside:,} logged {'value lies' if outside == 1 else 'values lie'} beyond the axis."
        )
    absent = [run.label for run in runs if not run.has(column)]
    if absent:
        notes.append(f"Not logged by {', '.join(absent)}.")
    chart = line_chart(
        column.replace("_", "-").replace("@", ""),
        title,
        f"{title} over training steps. At the end: "
        + ", ".join(
            f"{run.label} {value}" for (_, run), (_, value) in zip(shown, ends, strict=True)
        ),
        x,
        y,
        lines,
        x_label="step",
        x_ticks=[tick for tick in x.ticks() if tick.is_integer()],
        hits=[
            (
                place,
                "\n".join(
                    [
                        f"step {place:,}",
                        *(
                            f"{run.label}: {cell}"
                            for (_, run), cell in zip(shown, cells, strict=True)
                        ),
                    ]
                ),
            )
            for place, cells in rows
        ],
    )
    table = Table(
        ["step", *(run.label for _, run in shown)],
        [[f"{place:,}", *cells] for place, cells in rows],
        "The value logged last at or before each step; every line is in the csv file.",
    )
    return Figure(title, unit, chart, table, ends=ends, caption=" ".join(notes))


def _where_logged(run: Run, column: str) -> Run:
    logged = [(s, v) for s, v in zip(run.step, run.column(column), strict=True) if v is not None]
    return replace(run, step=[s for s, _ in logged], columns={column: [v for _, v in logged]})


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _rows(
    shown: Sequence[tuple[int, Run]], column: str, factor: float
) -> list[tuple[int, list[str]]]:
    """Some steps, evenly spread, each with the value of every run there."""
    places = sorted({place for _, run in shown for place in run.step})
    return [
        (
            places[i],
            [
                number(_scaled(value_at(run.step, run.column(column), places[i]), factor))
                for _, run in shown
            ],
        )
        for i in spread(len(places), _rows_of(len(shown)))
    ]


def _rows_of(runs: int) -> int:
    return max(8, min(16, _CELLS // runs))


def spectrum_charts(runs: Sequence[Run]) -> list[Figure]:
    """The cumulative spectrum of the text features with tau and the rank, then the rank by step."""
    ranks = curve_chart(runs, "rank", "Rank kept", "components", zero=True, smooth=False, step=True)
    shown = [(index, run) for index, run in enumerate(runs) if run.spectra]
    title, unit = "Explained variance of the text features", "cumulative share"
    if not shown:
        return [Figure(title, unit, missing="No run logged a spectrum."), ranks]
    last = [(index, run, run.spectra[-1]) for index, run in shown]
    taus = {tau for run in runs if (tau := _tau(run)) is not None}
    kept = {index: chosen_rank(run, spectrum) for index, run, spectrum in last}
    length = _length([spectrum for _, _, spectrum in last], [r for r in kept.values() if r])
    x, y = Scale(0, length), Scale(0, 1.04)
    lines = []
    for index, run in shown:
        first, final = run.spectra[0], run.spectra[-1]
        if first is not final:
            lines.append(Line(index, *_cumulative(first, length), "dashed"))
        lines.append(Line(index, *_cumulative(final, length)))
    over = []
    for tau in sorted(taus):
        over.append(rule("tau", y=y.at(tau)))
        over.append(label(1, y.at(tau), f"τ = {tau:g}", "", dy=16, anchor="end"))
    for place, (index, run, spectrum) in enumerate(last):
        rank = kept[index]
        if rank is None:
            continue
        share = spectrum.cumulative()[rank - 1]
        told = f"{run.label}: {rank} components hold {share:.1%} of the variance"
        over.append(
            f'<g class="{series_class(index)}">{rule("chosen", x=x.at(rank), top=y.at(share))}'
            f"{dots(index, [(x.at(rank), y.at(share), told)], 5)}"
            f"{label(x.at(rank), 0, f'R = {rank}', 'run', dx=7, dy=-10 - 16 * place)}</g>"
        )
    table = _spectrum_table(last)
    steps_shown = ", ".join(
        f"{run.label} {run.spectra[0].step:,} and {run.spectra[-1].step:,}" for _, run in shown
    )
    absent = [run.label for run in runs if not run.spectra]
    chart = line_chart(
        "spectrum",
        title,
        "Share of the variance held by the first components. "
        + "; ".join(
            f"{run.label}: {kept[index]} components kept"
            if kept[index] is not None
            else f"{run.label}: no rank chosen"
            for index, run, _ in last
        ),
        x,
        y,
        lines,
        x_label="components",
        over="".join(over),
    )
    caption = f"Dotted: first batch logged; solid: last (steps: {steps_shown})."
    if absent:
        caption += f" Not logged by {', '.join(absent)}."
    return [Figure(title, unit, chart, table, wide=True, caption=caption), ranks]


def chosen_rank(run: Run, spectrum: Spectrum) -> int | None:
    """The rank logged with a spectrum, else the smallest that reaches the run's tau.

    None for a run that projects on nothing, as with the plain CLIP loss.
    """
    if spectrum.rank is not None:
        return spectrum.rank
    tau = _tau(run)
    if tau is None:
        return None
    sums = spectrum.cumulative()
    return next((i for i, share in enumerate(sums, 1) if share >= tau), None)


def _tau(run: Run) -> float | None:
    """The threshold a run used; None where its loss has none."""
    if run.setting("loss") != "himo":
        return None
    tau = as_number(run.setting("tau"))
    if tau is None:
        preset = run.setting("preset")
        tau = PRESETS[preset]["variance_threshold"] if preset in _PRESET_NAMES else None
    return tau if tau is not None and 0 < tau <= 1 else None


def _length(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    """How many components to draw: until all but a hundredth is held, and well past the ranks."""
    ends = [
        next((i for i, share in enumerate(spectrum.cumulative(), 1) if share >= 0.99), None)
        or len(spectrum.ratios)
        for spectrum in spectra
    ]
    longest = max(len(spectrum.ratios) for spectrum in spectra)
    return max(2, min(longest, max([*ends, *(math.ceil(1.4 * rank) for rank in ranks)])))


def _cumulative(spectrum: Spectrum, length: int) -> tuple[list[float], list[float]]:
    sums = [0.0, *spectrum.cumulative()][: length + 1]
    return thin(list(range(len(sums))), sums, 100)


def _spectrum_table(last: Sequence[tuple[int, Run, Spectrum]]) -> Table:
    longest = max(len(spectrum.ratios) for _, _, spectrum in last)
    places = sorted(
        {1, 2, 3, 5, *(i + 1 for i in spread(longest, _rows_of(len(last))))}
        & set(range(1, longest + 1))
    )
    cumulative = [spectrum.cumulative() for _, _, spectrum in last]
    return Table(
        ["components", *(run.label for _, run, _ in last)],
        [
            [
                f"{place:,}",
                *(
                    f"{fixed(100 * s[place - 1], 2)} %" if place <= len(s) else "–"
                    for s in cumulative
                ),
            ]
            for place in places
        ],
        "Cumulative share of the variance, last batch logged.",
    )
