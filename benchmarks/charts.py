"""Line charts over a logarithmic axis as self-contained SVG files, for light and dark pages.

A README shows such a file as an image. So each file adds the style, the title and the names of the
curves to a chart of himo_charts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from himo_charts.scales import Scale, fit, number
from himo_charts.svg import Line as Curve
from himo_charts.svg import dots, label, line_chart, series_class, style, text

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 56, 46  # margins; the names of the curves are on the right
AREA = HEIGHT - TOP - BOTTOM  # pixels between the axis and the highest value

_STYLE = """
text { font-family: sans-serif; }
text.title { font-size: 15px; font-weight: 600; }
.page { fill: var(--page); }
.run0.solid { stroke-width: 3; }
"""


@dataclass(frozen=True)
class Line:
    """A named curve, and the sizes at which it ran out of memory."""

    name: str
    points: Sequence[tuple[int, float]]
    out_of_memory: Sequence[int] = field(default_factory=tuple)

    @property
    def is_compiled(self) -> bool:
        """Drawn so that the same formula without compilation remains visible beneath it."""
        return self.name.endswith("+compile")

    @property
    def formula(self) -> str:
        """The name without its compilation. It decides the colour."""
        return self.name.removesuffix("+compile")


def svg(
    title: str,
    unit: str,
    sizes: Sequence[int],
    lines: Sequence[Line],
    formulas: Sequence[str] | None = None,
) -> str:
    """The chart of positive values over sizes; both axes are logarithmic if they span decades.

    Charts with the same `formulas` give a formula the same colour; by default, those of the lines.
    """
    formulas = formulas or list(dict.fromkeys(line.formula for line in lines))
    runs = [formulas.index(line.formula) for line in lines]
    x = Scale(sizes[0], sizes[-1], log=True)
    y = fit((value for line in lines for _, value in line.points), log=True) or Scale(0, 1)
    heights = [AREA * (1 - y.at(line.points[-1][1])) if line.points else 0.0 for line in lines]
    marks = "".join(
        _marks(run, row, line, unit, x, y, 1 - height / AREA)
        for row, (run, line, height) in enumerate(zip(runs, lines, _apart(heights), strict=True))
    )
    chart = line_chart(
        "chart",
        title,
        unit,
        x,
        y,
        [
            Curve(
                run,
                [n for n, _ in line.points],
                [value for _, value in line.points],
                "broken" if line.is_compiled else "solid",
            )
            for run, line in zip(runs, lines, strict=True)
        ],
        x_label="N",
        y_label=unit,
        over=marks,
        x_ticks=sizes,
        names=lambda ticks: [f"{tick:,.10g}" for tick in ticks],
        height="100%",
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<style>{style()}{_STYLE}</style>"
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>'
        f'<text class="title" x="{LEFT - 46}" y="22">{text(title)}</text>'
        f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{AREA}">{chart}</svg>'
        "</svg>\n"
    )


def _marks(run: int, row: int, line: Line, unit: str, x: Scale, y: Scale, height: float) -> str:
    """The dots of a line, its name at a relative height, and OOM in a row where memory ran out."""
    tooltips = [
        (x.at(n), y.at(value), f"{line.name}, N = {n:,}: {number(value)} {unit}")
        for n, value in line.points
    ]
    # OOM is written above the size without a value, on a separate row for each line.
    oom = "".join(
        label(x.at(n), 1, "OOM", "run", dy=4 + 15 * row, anchor="end" if x.at(n) == 1 else "middle")
        for n in line.out_of_memory
    )
    name = label(1, height, line.name, "run", dx=14, dy=4, anchor="start")
    places = dots(run, tooltips, 2.5 if line.is_compiled else 4)
    return f'{places}<g class="{series_class(run)}">{oom}{name}</g>'


def _apart(places: Sequence[float], least: float = 15) -> list[float]:
    # The heights of labels, moved down if two would overlap.
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    excess = max([0.0, *(place - AREA for place in moved)])
    return [place - excess for place in moved]
