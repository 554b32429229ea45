"""What a template shows of a chart: its title, unit, drawing and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from himo_charts.svg import Svg


@dataclass(frozen=True)
class Table:
    """The numbers of a chart, ready to print: the first column holds the names of the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart with its numbers; or, where there are none, why.

    `ends` are values of runs beside the title, as (run, value).
    """

    title: str
    unit: str
    chart: Svg | None = None
    table: Table = field(default_factory=lambda: Table((), ()))
    ends: Sequence[tuple[int, str]] = ()
    wide: bool = False
    caption: str = ""
    missing: str = ""
