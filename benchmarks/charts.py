"""Line charts over a logarithmic axis as SVG files that stand alone, light and dark.

The charts of himo.report live in a page and take its style; a file that a README shows as an image
has to bring its own. Scales and colours are theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from himo.report.scales import Scale, fit, number
from himo.report.style import COLOURS, DARK, LIGHT

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 56, 46  # margins; names stand at the right


@dataclass(frozen=True)
class Line:
    """A named curve, and the sizes at which it ran out of memory."""

    name: str
    points: Sequence[tuple[int, float]]
    out_of_memory: Sequence[int] = field(default_factory=tuple)


def svg(title: str, unit: str, sizes: Sequence[int], lines: Sequence[Line]) -> str:
    """The chart of positive values over sizes, both logarithmic where they span decades."""
    x = Scale(sizes[0], sizes[-1], log=True)
    values = [value for line in lines for _, value in line.points]
    y = fit(values, log=True) or Scale(0, 1)

    def across(size: int) -> float:
        return LEFT + x.at(size) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - y.at(value) * (HEIGHT - TOP - BOTTOM)

    ticks = y.ticks()
    parts = [
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text class="quiet" x="{LEFT}" y="42">{escape(unit)}</text>',
        f'<text class="quiet" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">N</text>',
    ]
    for tick in ticks:
        parts.append(
            f'<path class="grid" d="M{LEFT} {down(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="quiet" x="{LEFT - 8}" y="{down(tick) + 4:.1f}" text-anchor="end">'
            f"{tick:,.10g}</text>"
        )
    for size in sizes:
        parts.append(
            f'<text class="quiet" x="{across(size):.1f}" y="{HEIGHT - BOTTOM + 20}" '
            f'text-anchor="middle">{size:,}</text>'
        )
    places = _apart([down(line.points[-1][1]) if line.points else TOP for line in lines])
    for index, (line, place) in enumerate(zip(lines, places, strict=True)):
        path = "L".join(f"{across(n):.1f} {down(value):.1f}" for n, value in line.points)
        dots = "".join(
            f'<circle cx="{across(n):.1f}" cy="{down(value):.1f}" r="3.5">'
            f"<title>{escape(line.name)}, N = {n:,}: {number(value)} {escape(unit)}</title>"
            "</circle>"
            for n, value in line.points
        )
        # OOM stands above the size at which there is no value, each line on a row of its own.
        marks = "".join(
            f'<text class="oom" x="{across(n):.1f}" y="{TOP + 4 + 15 * index}" '
            f'text-anchor="{"end" if n == sizes[-1] else "middle"}">OOM</text>'
            for n in line.out_of_memory
        )
        width = 3 if index == 0 else 1.5
        parts.append(
            f'<g class="s{index % COLOURS}"><path d="M{path}" stroke-width="{width}"/>{dots}{marks}'
            f'<text class="name" x="{WIDTH - RIGHT + 14}" y="{place + 4:.1f}">'
            f"{escape(line.name)}</text></g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{escape(title)}</title><style>{_style()}</style>"
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>{"".join(parts)}</svg>\n'
    )


def _apart(places: Sequence[float], least: float = 15) -> list[float]:
    # The heights of labels, moved down where two would overlap.
    moved = list(places)
    order = sorted(range(len(places)), key=places.__getitem__)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + least)
    excess = max([0.0, *(place - (HEIGHT - BOTTOM) for place in moved)])
    return [place - excess for place in moved]


def _style() -> str:
    def colours(theme: dict[str, str]) -> str:
        lines = "".join(f".s{i}{{color:{theme[f'c{i}']}}}" for i in range(COLOURS))
        return (
            f".page{{fill:{theme['page']}}}text{{fill:{theme['text']}}}"
            f".quiet{{fill:{theme['quiet']}}}.grid{{stroke:{theme['grid']}}}{lines}"
        )

    return (
        "text{font:12px sans-serif}.title{font-size:15px;font-weight:600}"
        "path{fill:none;stroke:currentColor}circle,.name,.oom{fill:currentColor}"
        f".name,.oom{{font-weight:600}}{colours(LIGHT)}"
        f"@media(prefers-color-scheme:dark){{{colours(DARK)}}}"
        # After the colours of text, which would win otherwise.
        "g .name,g .oom{fill:currentColor}"
    )
