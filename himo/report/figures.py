"""What a template shows of a chart: its title, drawing and numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from himo.report.runs import Run
from himo_charts.scales import Scale, fixed
from himo_charts.svg import Svg, bar_chart


@dataclass(frozen=True)
class Table:
    """The numbers of a chart, ready to print: the first column holds the names of the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers, or the reason why there is none.

    `ends` are values of runs next to the title, as (run, value).
    """

    title: str
    chart: Svg | None = None
    table: Table = field(default_factory=lambda: Table((), ()))
    ends: Sequence[tuple[int, str]] = ()
    wide: bool = False
    caption: str = ""
    missing: str = ""


def bar_figure(
    figure: Figure,
    ident: str,
    heading: str,
    runs: Sequence[Run],
    names: Sequence[str],
    bars: Sequence[Sequence[float | None]],
    y: Scale,
    spoken: Callable[[float | None], str],
    *,
    y_label: str,
    chance: Sequence[float | None],
    decimals: int = 1,
) -> Figure:
    """`figure` with a bar of each run under each name, and a table of their values.

    Args:
        ident: unique on the page.
        heading: the chart's own title, for those who hear it; `spoken` writes its values.
        bars: for each run a value for each name.
        chance: for each name the value of guessing, where one is known.
        decimals: above the bars; the table has one more.
    """
    told = (
        f"{run.label}: "
        + ", ".join(f"{name} {spoken(value)}" for name, value in zip(names, values, strict=True))
        for run, values in zip(runs, bars, strict=True)
    )
    chart = bar_chart(
        *(ident, heading, "; ".join(told), names, bars, y),
        y_label=y_label,
        chance=chance,
        decimals=decimals,
    )
    rows = [
        [run.label, *(fixed(value, decimals + 1) for value in values)]
        for run, values in zip(runs, bars, strict=True)
    ]
    return replace(figure, chart=chart, table=Table(["", *names], rows))
