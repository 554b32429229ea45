"""Charts as inline SVG that fill whatever width they get, with text that never shrinks.

The root `svg` is the area of the plot and lets its labels stand outside it. Lines lie in an inner
`svg` that is stretched to the area, text and dots in the outer one at percentages of its width.
Colours come from the classes `s0`, `s1`, ... of the page's style, one for each run.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from himo.report.scales import Scale, fixed, number, tick_labels
from himo.report.style import COLOURS

HEIGHT = 180  # pixels of the plot area
_GRID = 1000  # units of the inner svg, in both directions
# Controls, halves of surrogate pairs, and marks that turn the direction of what follows them.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Line:
    """A curve of one run; NaN in `y` is a gap. `style`: solid, faint, step or dashed."""

    run: int
    x: Sequence[float]
    y: Sequence[float]
    style: str = "solid"


@dataclass(frozen=True)
class Table:
    """The numbers of a chart, ready to print: the first column holds the names of the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def text(value: object) -> str:
    """Anything as HTML text or attribute value; characters no page should hold are replaced."""
    return escape(_UNFIT.sub("\ufffd", str(value)))


def colour_class(run: int) -> str:
    """The class that gives the colour of a run."""
    return f"s{run % COLOURS}"


def series_class(run: int) -> str:
    """The classes of what belongs to a run in a chart: its colour, and to be hidden with it."""
    return f"{colour_class(run)} run{run}"


def swatch(run: int) -> str:
    """A short bar in the colour of a run, as HTML."""
    return f'<span class="{colour_class(run)}"><span class="swatch"></span></span>'


def figure(
    title: str,
    unit: str,
    svg: str,
    table: Table,
    *,
    ends: Sequence[tuple[int, str]] = (),
    wide: bool = False,
    caption: str = "",
) -> str:
    """A chart with its title, its unit, a value of each run, and its numbers folded below."""
    shown = "".join(
        f'<span class="{series_class(run)} end">{text(value)}</span>' for run, value in ends
    )
    return (
        f'<figure class="chart{" wide" if wide else ""}"><figcaption><h3>{text(title)}</h3>'
        f'<span class="unit">{text(unit)}</span><span class="ends">{shown}</span></figcaption>'
        f'<div class="plot">{svg}</div>'
        f"{f'<p class=note>{text(caption)}</p>' if caption else ''}{details(table)}</figure>"
    )


def empty_figure(title: str, unit: str, reason: str) -> str:
    """The place of a chart for which there are no numbers, and why."""
    return (
        f'<figure class="chart"><figcaption><h3>{text(title)}</h3>'
        f'<span class="unit">{text(unit)}</span></figcaption>'
        f'<div class="nothing"><p>{text(reason)}</p></div></figure>'
    )


def details(table: Table, summary: str = "Numbers") -> str:
    return f"<details><summary>{text(summary)}</summary>{table_html(table)}</details>"


def table_html(table: Table, extra: str = "", marks: Sequence[str] = ()) -> str:
    """A table whose first column and row are headers; it scrolls where it is too wide.

    Args:
        extra: more classes.
        marks: HTML in front of the name of each row.
    """
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in table.head)
    body = "".join(
        f'<tr><th scope="row">{mark}{text(row[0])}</th>'
        f"{''.join(f'<td>{text(cell)}</td>' for cell in row[1:])}</tr>"
        for mark, row in zip(marks or [""] * len(table.rows), table.rows, strict=True)
    )
    note = f"<p class=note>{text(table.note)}</p>" if table.note else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="numbers {extra}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def line_chart(
    ident: str,
    title: str,
    description: str,
    x: Scale,
    y: Scale,
    lines: Sequence[Line],
    *,
    x_label: str,
    over: str = "",
    under: str = "",
    x_ticks: Sequence[float] | None = None,
    hits: Sequence[tuple[float, str]] = (),
) -> str:
    """Curves over a horizontal scale.

    Args:
        ident: unique on the page.
        over: more SVG, drawn above the curves in the outer coordinates.
        under: more SVG, drawn below the curves in the inner coordinates.
        x_ticks: where the horizontal axis is labelled; None chooses round values.
        hits: places on the horizontal axis, each with what a pointer there is told.
    """
    ticks = x.ticks() if x_ticks is None else x_ticks
    labels = tick_labels(ticks)
    below = "".join(
        f'<text class="tick" x="{_percent(x.at(tick))}" y="{HEIGHT + 18}" '
        f'text-anchor="{_anchor(x.at(tick))}">{label}</text>'
        for tick, label in zip(ticks, labels, strict=True)
    )
    order = {"faint": 0, "dashed": 1}
    paths = "".join(
        f'<path class="{series_class(line.run)} {line.style}" d="{path(x, y, line)}"/>'
        for line in sorted(lines, key=lambda line: order.get(line.style, 2))
    )
    return (
        _open(ident, title, description)
        + _horizontal_grid(y)
        + below
        + f'<text class="tick axis" x="100%" y="{HEIGHT + 34}" text-anchor="end">'
        f"{text(x_label)}</text>"
        f"{_stretched(under + paths, 'lines')}{over}{_hits(x, hits)}</svg>"
    )


def bar_chart(
    ident: str,
    title: str,
    description: str,
    groups: Sequence[str],
    bars: Sequence[Sequence[float | None]],
    y: Scale,
    *,
    chance: Sequence[float | None],
    decimals: int = 1,
) -> str:
    """Groups of bars that start at zero, one bar for each run.

    Args:
        groups: their names.
        bars: for each run one value a group; None leaves the place empty.
        chance: for each group what guessing gives, drawn as a line across it, or None.
    """
    parts = [_open(ident, title, description), _horizontal_grid(y)]
    slot = 1 / len(groups)
    width = min(0.8 * slot / max(1, len(bars)), 0.12)
    for g, group in enumerate(groups):
        centre = (g + 0.5) * slot
        parts.append(
            f'<text class="tick" x="{_percent(centre)}" y="{HEIGHT + 18}" '
            f'text-anchor="middle">{text(group)}</text>'
        )
        for run, values in enumerate(bars):
            value = values[g]
            if value is None or not math.isfinite(value):
                continue
            left = centre + (run - len(bars) / 2) * width
            top = (1 - y.at(max(value, y.low))) * HEIGHT
            parts.append(
                f'<g class="{series_class(run)}"><rect class="bar" x="{_percent(left)}" '
                f'y="{top:.1f}" width="{_percent(width * 0.92)}" height="{HEIGHT - top:.1f}">'
                f"<title>{text(group)}: {number(value)}</title></rect>"
            )
            if len(bars) <= 3:
                parts.append(
                    f'<text class="value" x="{_percent(left + width * 0.46)}" y="{top - 5:.1f}" '
                    f'text-anchor="middle">{fixed(value, decimals)}</text>'
                )
            parts.append("</g>")
        level = chance[g]
        if level is not None and y.holds(level):
            ends = f'x1="{_percent(centre - 0.46 * slot)}" x2="{_percent(centre + 0.46 * slot)}"'
            height = _pixels(y.at(level))
            # On a line in the colour of the page, so that it shows on a bar too.
            parts.append(
                f'<g class="chance"><title>chance: {number(level)}</title>'
                f'<line {ends} y1="{height}" y2="{height}"/>'
                f'<line {ends} y1="{height}" y2="{height}"/></g>'
            )
    return "".join(parts) + "</svg>"


def path(x: Scale, y: Scale, line: Line) -> str:
    """The `d` of a curve in the inner coordinates; a lone point becomes a dot."""
    parts: list[str] = []
    pen = False
    before = (0, 0)
    for place, value in zip(line.x, line.y, strict=True):
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = False
            continue
        # Values off the axis leave the area, where they are clipped.
        column = round(x.at(place) * _GRID)
        row = round(max(-3.0, min(4.0, 1 - y.at(value))) * _GRID)
        right, down = column - before[0], row - before[1]
        if not pen:
            parts.append(f"M{column} {row}h0")
        elif line.style == "step":
            parts.append(f"h{right}v{down}" if down else f"h{right}")
        else:
            parts.append(f"l{right} {down}" if down >= 0 else f"l{right}{down}")
        pen, before = True, (column, row)
    return "".join(parts)


def dots(run: int, places: Iterable[tuple[float, float, str]], radius: float = 4) -> str:
    """Dots of one run at shares of the width and the height, each with what it tells."""
    circles = "".join(
        f'<circle cx="{_percent(x)}" cy="{_pixels(y)}" r="{radius:g}">'
        f"<title>{text(title)}</title></circle>"
        for x, y, title in places
    )
    return f'<g class="{series_class(run)} dots">{circles}</g>'


def triangles(run: int, places: Iterable[tuple[float, float, str]]) -> str:
    """Marks that point down, for scores that do not rise; upright whatever the width."""
    marks = "".join(
        f'<svg x="{_percent(x)}" y="{_pixels(y)}"><polygon points="-7,-5 7,-5 0,8">'
        f"<title>{text(title)}</title></polygon></svg>"
        for x, y, title in places
    )
    return f'<g class="run{run} fallen">{marks}</g>'


def label(
    x: float, y: float, content: str, css: str, *, dx: float = 0, dy: float = 0, anchor: str = ""
) -> str:
    """Text at shares of the area, moved by pixels."""
    place = anchor or ("end" if x > 0.7 else "start")
    return (
        f'<text class="{css}" x="{_percent(x)}" y="{(1 - y) * HEIGHT:.1f}" '
        f'dx="{-dx if place == "end" else dx:g}" dy="{dy:g}" text-anchor="{place}">'
        f"{text(content)}</text>"
    )


def rule(css: str, *, x: float | None = None, y: float | None = None, top: float = 1) -> str:
    """A line across the area at a height `y`, or up from the axis at `x` to a height `top`."""
    if y is not None:
        height = f"{(1 - y) * HEIGHT:.1f}"
        return f'<line class="{css}" x1="0" x2="100%" y1="{height}" y2="{height}"/>'
    place = _percent(x or 0)
    return (
        f'<line class="{css}" x1="{place}" x2="{place}" y1="{HEIGHT}" '
        f'y2="{(1 - top) * HEIGHT:.1f}"/>'
    )


def _open(ident: str, title: str, description: str) -> str:
    return (
        f'<svg width="100%" height="{HEIGHT}" role="img" '
        f'aria-labelledby="{ident}-title {ident}-desc">'
        f'<title id="{ident}-title">{text(title)}</title>'
        f'<desc id="{ident}-desc">{text(description)}</desc>'
    )


def _horizontal_grid(y: Scale) -> str:
    ticks = y.ticks()
    heights = [round((1 - y.at(tick)) * _GRID) for tick in ticks]
    names = "".join(
        f'<text class="tick" x="-8" y="{_pixels(y.at(tick))}" dy="4" text-anchor="end">'
        f"{name}</text>"
        for tick, name in zip(ticks, tick_labels(ticks), strict=True)
    )
    rules = "".join(f"M0 {height}h{_GRID}" for height in heights)
    base = f'<path class="base" d="M0 {_GRID}h{_GRID}"/>'
    return names + _stretched(f'<path class="grid" d="{rules}"/>{base}', "rules")


def _stretched(content: str, css: str) -> str:
    """The inner svg, of _GRID units in both directions."""
    return (
        f'<svg class="{css}" width="100%" height="{HEIGHT}" viewBox="0 0 {_GRID} {_GRID}" '
        f'preserveAspectRatio="none">{content}</svg>'
    )


def _hits(x: Scale, hits: Sequence[tuple[float, str]]) -> str:
    """Invisible columns that tell their numbers to a pointer."""
    if not hits:
        return ""
    places = [min(1.0, max(0.0, x.at(place))) for place, _ in hits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 1.0]
    return "".join(
        f'<rect class="hit" x="{_percent(left)}" width="{_percent(right - left)}" '
        f'height="{HEIGHT}"><title>{text(content)}</title></rect>'
        for (_, content), left, right in zip(hits, edges[:-1], edges[1:], strict=True)
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _pixels(share: float) -> str:
    """A height in the outer svg, whose origin is above."""
    return f"{(1 - share) * HEIGHT:.1f}"


def _anchor(share: float) -> str:
    return "end" if share > 0.97 else "middle"
