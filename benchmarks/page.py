"""The page of a report: what its template shows, computed from rows. Nothing is measured here."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from benchmarks import compare, templates
from benchmarks.cases import Case
from benchmarks.compare import Change
from benchmarks.plot import LABELS, cells, options, place, quoted_ms, size, table_rows, work
from benchmarks.rows import LIBRARY, Row
from himo_charts.scales import Scale, fit, number
from himo_charts.svg import (
    Bar,
    Line,
    Svg,
    bar_list,
    dots,
    label,
    line_chart,
    rule,
    series_class,
)

OURS, OTHER = 0, 6  # colours
LIBRARY_NAME = "himo_kernels"
GPU_GIB = (24, 40, 80, 141)
MIB, GIB = 1 << 20, 1 << 30
MODEL_SIZES = tuple(2**k for k in range(10, 18))  # samples of the chart of memory
MODEL_WIDTH = 768

Cell = tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A chart under its title."""

    title: str
    chart: Svg


@dataclass(frozen=True)
class Errors:
    """The errors of one kind of cell: a line for each candidate, a column for each size."""

    title: str
    sizes: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Comparison:
    """The changes since an earlier run."""

    name: str  # of its folder
    changes: Sequence[Change]
    same: bool  # it has rows of this machine and number of threads

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.is_regression]

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if not self.changes:
            reason = "" if self.same else ": it is of another machine or number of threads"
            return f"No cell of this run is in {self.name}{reason}."
        count = len(self.regressions)
        cells = f"{len(self.changes)} cell{'s' * (len(self.changes) != 1)}"
        if not count:
            return f"No regression in {cells}."
        return f"{count} of {cells} became slower or no longer run{'s' * (count == 1)}."


def sentence(change: Change) -> str:
    """A change in words."""
    place = f"{change.work} {change.dtype}"
    if not change.after_ms:
        return f"{place} no longer runs: {change.reason}"
    return (
        f"{place} is {change.verdict}: {change.before_ms:.3g} ms before, {change.after_ms:.3g} ms "
        f"now, {100 * (change.ratio - 1):+.0f} % after the baselines' own change"
    )


def render(
    rows: list[Row],
    left_out: list[Case],
    curves: dict[str, list[float]],
    facts: dict[str, str],
    comparison: Comparison | None,
    now: datetime,
) -> str:
    """The page of one run."""
    found = dict(sorted(cells(rows).items(), key=place))
    return templates.render(
        "page.html",
        facts=_facts(facts, rows, now),
        summary=table_rows(rows),
        died=[f"{LABELS[r['op']]} {r['N']} {r['dtype']}: {r['reason']}" for r in _dead(rows)],
        left_out=[f"{LABELS[case.op]} {case.size} {case.dtype}" for case in left_out],
        refused=_refused(rows),
        operators=[
            (LABELS[op], own)
            for op in LABELS
            if (
                own := [
                    (_speed(*item), _memory(*item)) for item in found.items() if item[0][0] == op
                ]
            )
        ],
        model=_memory_model(found),
        rooflines=_rooflines(found),
        ceilings=_ceilings(rows),
        errors=_errors(found),
        curves=_curves(curves),
        comparison=comparison,
        sentence=sentence,
        number=number,
    )


def _facts(facts: dict[str, str], rows: list[Row], now: datetime) -> list[tuple[str, str]]:
    loads = [float(row["load"]) for row in rows if row["load"]]
    during = f"; {min(loads):.2f} to {max(loads):.2f} while it ran" if loads else ""
    named = {
        "processor" if not facts["cuda"] else "GPU": facts["device"],
        "instructions": facts["instructions"],
        "threads": facts["threads"],
        "torch": facts["torch"],
        "CUDA": facts["cuda"],
        "driver": facts["driver"],
        "commit": facts["commit"],
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "load average": f"{facts['load']} before{during}",
    }
    return [(name, value) for name, value in named.items() if value]


def _dead(rows: list[Row]) -> list[Row]:
    return [row for row in rows if not row["mode"]]


def _refused(rows: list[Row]) -> list[str]:
    reasons = {
        row["backend"]: row["reason"]
        for row in rows
        if row["status"] == "refused" and row["backend"] not in LIBRARY
    }
    return [f"{name} ({reason})" for name, reason in sorted(reasons.items())]


def _shown(found: dict[str, Row]) -> dict[str, Row]:
    """The automatic choice under the library's name, then every baseline, also without a time."""
    own = compare.automatic(found)
    others = {
        name: row
        for name, row in sorted(
            found.items(), key=lambda item: ("released" not in item[0], item[0])
        )
        if name not in LIBRARY
    }
    return ({LIBRARY_NAME: own} if own else {}) | others


def _ident(kind: str, cell: Cell) -> str:
    return re.sub(r"[^\w-]+", "-", "-".join((kind, *cell)))


def _missing(row: Row) -> str:
    # "left out: over 2.0 s, of 6 s for the baselines of a cell": up to the comma, for a bar.
    if row["status"] == "left out":
        return row["reason"].split(", ")[0]
    if row["status"] == "out of memory":
        return "OOM"
    if row["status"] == "inaccurate":
        return f"inaccurate: error {_error(row)}"
    if row["status"] == "refused":
        return row["reason"]
    return f"{row['status']}: {row['reason']}"[:36]  # what a phone has room for


def _speed(cell: Cell, found: dict[str, Row]) -> Figure:
    shown = _shown(found)
    ours = quoted_ms(shown[LIBRARY_NAME]) if LIBRARY_NAME in shown else 0.0
    bars = []
    for name, row in shown.items():
        ms, is_ours = quoted_ms(row), name == LIBRARY_NAME
        ratio = f" ({ms / ours:.2f}x)" if ours and not is_ours else ""
        words = f"{number(ms, 3)} ms{ratio}" if ms else _missing(row)
        bars.append(Bar(OURS if is_ours else OTHER, name, ms or None, words))
    title = f"{work(cell)}, {cell[4]}: time"
    return Figure(title, bar_list(_ident("time", cell), title, "ms", bars))


def _memory(cell: Cell, found: dict[str, Row]) -> Figure | None:
    """None where no peak is known."""
    bars = []
    for name, row in _shown(found).items():
        mib = float(row["peak_mib"] or 0)
        words = "not measured" if row["status"] == "ok" else _missing(row)
        words = f"{number(mib, 3)} MiB" if mib else words
        bars.append(Bar(OURS if name == LIBRARY_NAME else OTHER, name, mib or None, words))
    if not any(bar.value or bar.shown == "OOM" for bar in bars):
        return None
    title = f"{work(cell)}, {cell[4]}: memory beyond the inputs"
    return Figure(title, bar_list(_ident("memory", cell), title, "MiB", bars))


def own_bytes(n: int) -> float:
    """The dual loss of the cpu backend, float32: gradients, factors, statistics, workspace."""
    return 2 * 3 * n * MODEL_WIDTH * 4 + 128 * n + 16 * MIB


def dense_bytes(n: int) -> float:
    """open_clip's formula, float32: gradients, and six N x N matrices at its peak.

    Four are the log-softmaxes that autograd saves, two the gradient of one pair of logits.
    """
    return 3 * n * MODEL_WIDTH * 4 + 6 * 4 * n**2


def _memory_model(found: dict[Cell, dict[str, Row]]) -> Svg:
    x = Scale(MODEL_SIZES[0], MODEL_SIZES[-1], log=True)
    y = Scale(0.02, 800, log=True)
    forms = ((OURS, LIBRARY_NAME, own_bytes), (1, "open_clip's formula", dense_bytes))
    lines = [Line(run, MODEL_SIZES, [form(n) / GIB for n in MODEL_SIZES]) for run, _, form in forms]
    over = "".join(
        rule("tau", y=y.at(gib)) + label(0, y.at(gib), f"{gib} GiB", "tick", dx=4, dy=-4)
        for gib in GPU_GIB
    )
    for run, name, form in forms:
        at = MODEL_SIZES[-1]
        over += f'<g class="{series_class(run)}">'
        over += label(1, y.at(form(at) / GIB), name, "run", dx=4, dy=-10, anchor="end") + "</g>"
    for run, backend in ((OURS, LIBRARY_NAME), (1, "open_clip")):
        measured = [
            (int(cell[2]), float(row["peak_mib"]) / 1024)
            for cell, candidates in found.items()
            if (cell[0], cell[3], cell[4]) == ("dual_info_nce", str(MODEL_WIDTH), "float32")
            and (row := _shown(candidates).get(backend))
            and row["peak_mib"]
        ]
        over += dots(
            run,
            [
                (x.at(n), y.at(gib), f"{backend}, N = {n:,}: {number(gib, 3)} GiB measured")
                for n, gib in measured
                if x.holds(n) and y.holds(gib)
            ],
        )
    return line_chart(
        "memory-model",
        "Extra memory of the dual loss against N",
        "GiB, float32, D = 768, forward and backward",
        x,
        y,
        lines,
        x_label="N",
        y_label="GiB",
        over=over,
        x_ticks=MODEL_SIZES[1::2],  # as many as a phone has room for
        names=lambda ticks: [f"{tick:,.10g}" for tick in ticks],
        height="400",
    )


def _rooflines(found: dict[Cell, dict[str, Row]]) -> list[Figure]:
    groups: dict[str, list[Bar]] = defaultdict(list)
    for cell, candidates in found.items():
        own = compare.automatic(candidates)
        if own is None or not own["fraction"]:
            continue
        plain = [row for row in compare.formulas(cell[0], candidates) if row["fraction"]]
        best = min(plain, key=quoted_ms, default=None)
        for run, name, row in ((OURS, size(cell), own), (OTHER, best and best["backend"], best)):
            if row is not None:
                share = 100 * float(row["fraction"])
                words = f"{number(share, 2)} % ({row['bound']})"
                groups[_kind(cell)].append(Bar(run, name, share, words))
    figures = []
    for index, (kind, bars) in enumerate(groups.items()):
        full = max(100.0, *(bar.value or 0.0 for bar in bars))
        title = f"{kind}: share of the roofline"
        figures.append(Figure(kind, bar_list(f"roofline-{index}", title, "%", bars, full=full)))
    return figures


def _kind(cell: Cell) -> str:
    """What the sizes of a chart or table have in common: operator, options and dtype."""
    return ", ".join([LABELS[cell[0]], *options(cell), cell[4]])


def _ceilings(rows: list[Row]) -> str:
    found = {
        row["dtype"]: f"{1e3 * float(row['ceiling_tflops']):.0f} GFLOP/s in {row['dtype']}"
        for row in rows
        if row["ceiling_tflops"]
    }
    copies = {
        f"{float(row['ceiling_gbs']):.1f} GB/s of a copy" for row in rows if row["ceiling_gbs"]
    }
    return ", ".join([*found.values(), *copies])


def _errors(found: dict[Cell, dict[str, Row]]) -> list[Errors]:
    groups: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for cell, candidates in found.items():
        for name, row in _shown(candidates).items():
            if row["status"] != "refused":
                groups[_kind(cell)].setdefault(name, {})[size(cell)] = _error(row)
    tables = []
    for kind, lines in groups.items():
        sizes = list(dict.fromkeys(n for line in lines.values() for n in line))
        body = [(name, [line.get(n, "–") for n in sizes]) for name, line in lines.items()]
        tables.append(Errors(kind, sizes, body))
    return tables


def _error(row: Row) -> str:
    if not row["error"]:
        return "–"
    error = float(row["error"])
    return f"{error:.1e}" if math.isfinite(error) else "NaN"


@dataclass(frozen=True)
class Curves:
    """The losses of two runs of SGD, and how far they are apart."""

    losses: Svg
    apart: Svg | None  # None where they are equal in every step
    steps: int
    first: str
    last: str
    largest: str


def _curves(curves: dict[str, list[float]]) -> Curves:
    ours, plain = curves["auto"], curves["eager"]
    steps = range(len(ours))
    x = Scale(0, max(1, len(ours) - 1))
    apart = [abs(a - b) for a, b in zip(ours, plain, strict=True)]
    y = fit([*ours, *plain], log=True) or Scale(0, 1)
    marks = [
        (x.at(step), y.at(ours[step]), f"step {step}: {number(ours[step], 6)}")
        for step in steps[::5]
        if math.isfinite(ours[step])
    ]
    over = dots(OURS, marks, 3.5)
    plain_line = [Line(1, steps, plain)]
    chart = line_chart(
        *("losses", "Loss by step", "nats", x, y, plain_line),
        x_label="step",
        y_label="loss, nats",
        over=over,
    )
    scale = fit([0.0, *apart], zero=True)
    difference = scale and line_chart(
        *("apart", "Difference by step", "nats", x, scale, [Line(OTHER, steps, apart)]),
        x_label="step",
        y_label="absolute difference, nats",
    )
    return Curves(
        chart,
        difference if any(apart) else None,
        len(ours),
        number(ours[0], 5),
        number(ours[-1], 5),
        number(max(apart), 2),
    )
