"""Charts as SVG that scale to any width, with text of constant size.

The root `svg` is the plot area; its labels overflow it. Lines are in an inner `svg`, stretched to
the area; text and dots are in the outer one, at percentages of its size. Colours come from the
classes `s0`, `s1`, ... of colours.css, one per run; other styles come from charts.css. A page that
shows a chart must include both, which `style()` returns.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from himo_charts.scales import Scale, fixed, number, tick_labels

COLOURS = 8  # s0 to s7 in colours.css; further runs reuse them
HEIGHT = "180"  # default height of the plot area, in pixels
_BAR_STEP = 22  # pixels from one bar of a list to the next
_SLIVER = 0.006  # least width of a bar of a list, so that the smallest is visible
GRID = 1000  # width and height of the inner svg, in its own coordinates
STRETCHED = f'viewBox="0 0 {GRID} {GRID}" preserveAspectRatio="none"'
# Control characters, lone surrogates, and marks that change the direction of text.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


@dataclass(frozen=True)
class Line:
    """A curve of one run; NaN in `y` is a gap. `style`: solid, broken, faint, step or dashed.

    A broken line, drawn on a solid one, leaves it visible where both have the same values.
    """

    run: int
    x: Sequence[float]
    y: Sequence[float]
    style: str = "solid"


@dataclass(frozen=True)
class Bar:
    """A bar of a list: its name, its value, and the text after it. Without a value only text."""

    run: int
    name: str
    value: float | None
    shown: str


class Svg(str):
    """SVG whose texts are escaped; templates with automatic escaping insert it unchanged."""

    def __html__(self) -> str:
        return self


def style() -> str:
    """The style sheet of the charts: light and dark colours, and marks."""
    return _sheet("colours.css") + _sheet("charts.css")


def page_style() -> str:
    """The style sheet of the charts, and of tables that may be wider than a page."""
    return style() + _sheet("tables.css")


def _sheet(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def readable(value: object) -> str:
    """Any value as text; characters that do not belong on a page are replaced."""
    return _UNFIT.sub("\ufffd", str(value))


def text(value: object) -> str:
    """Any value as text or attribute of SVG, escaped and `readable`."""
    return escape(readable(value))


def colour_class(run: int) -> str:
    """The CSS class for the colour of a run."""
    return f"s{run % COLOURS}"


def series_class(run: int) -> str:
    """The CSS classes of a run's marks: its colour, and its name to hide them."""
    return f"{colour_class(run)} run{run}"


def line_chart(
    ident: str,
    title: str,
    description: str,
    x: Scale,
    y: Scale,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    over: str = "",
    under: str = "",
    x_ticks: Sequence[float] | None = None,
    hits: Sequence[tuple[float, str]] = (),
    names: Callable[[Sequence[float]], list[str]] = tick_labels,
    height: str = HEIGHT,
) -> Svg:
    """Curves over a horizontal scale.

    Args:
        ident: unique on the page.
        over: SVG drawn on top of the curves, in outer coordinates.
        under: SVG drawn beneath the curves, in inner coordinates.
        x_ticks: labelled values of the horizontal axis; None chooses round values.
        hits: positions on the horizontal axis, each with its tooltip.
        names: returns the labels of an axis's ticks.
        height: of the area, in pixels or as a percentage of its container.
    """
    ticks = x.ticks() if x_ticks is None else x_ticks
    labels = names(ticks)
    below = "".join(
        f'<text class="tick" x="{percent(x.at(tick))}" y="100%" dy="18" '
        f'text-anchor="{_anchor(x.at(tick))}">{label}</text>'
        for tick, label in zip(ticks, labels, strict=True)
    )
    order = {"faint": 0, "dashed": 1}
    paths = "".join(
        f'<path class="{series_class(line.run)} {line.style}" d="{path(x, y, line)}"/>'
        for line in sorted(lines, key=lambda line: order.get(line.style, 2))
    )
    return Svg(
        opening(ident, title, description, height)
        + _vertical_axis(y, names, y_label)
        + below
        + f'<text class="tick axis" x="100%" y="100%" dy="34" text-anchor="end">'
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
    y_label: str,
    chance: Sequence[float | None],
    decimals: int = 1,
) -> Svg:
    """Groups of bars that start at zero, with one bar per run.

    Args:
        groups: the names of the groups.
        bars: for each run one value per group; None leaves a gap.
        chance: for each group the score of guessing, drawn as a line across it, or None.
    """
    parts = [opening(ident, title, description, HEIGHT), _vertical_axis(y, tick_labels, y_label)]
    values = []  # on top of everything else
    slot = 1 / len(groups)
    width = min(0.8 * slot / max(1, len(bars)), 0.12)
    for g, group in enumerate(groups):
        centre = (g + 0.5) * slot
        parts.append(
            f'<text class="tick" x="{percent(centre)}" y="100%" dy="18" '
            f'text-anchor="middle">{text(group)}</text>'
        )
        for run, of_run in enumerate(bars):
            value = of_run[g]
            if value is None or not math.isfinite(value):
                continue
            left = centre + (run - len(bars) / 2) * width
            bottom, top = sorted((y.at(0), y.at(value)))
            parts.append(
                f'<g class="{series_class(run)}"><rect class="bar" x="{percent(left)}" '
                f'y="{percent(1 - top)}" width="{percent(width * 0.92)}" '
                f'height="{percent(top - bottom)}">'
                f"<title>{text(group)}: {number(value)}</title></rect></g>"
            )
            if len(bars) <= 3:
                shown = fixed(value, decimals)
                place = label(left + width * 0.46, top, shown, "value", dy=-5, anchor="middle")
                values.append(f'<g class="{series_class(run)}">{place}</g>')
        guess = chance[g]
        if guess is not None and y.holds(guess):
            ends = f'x1="{percent(centre - 0.46 * slot)}" x2="{percent(centre + 0.46 * slot)}"'
            height = percent(1 - y.at(guess))
            # On top of a line in the page's colour, so that it is visible on a bar too.
            parts.append(
                f'<g class="chance"><title>chance: {number(guess)}</title>'
                f'<line {ends} y1="{height}" y2="{height}"/>'
                f'<line {ends} y1="{height}" y2="{height}"/></g>'
            )
    return Svg("".join([*parts, *values]) + "</svg>")


def bar_list(
    ident: str, title: str, description: str, bars: Sequence[Bar], *, full: float | None = None
) -> Svg:
    """Bars to the right from zero, one below the other.

    Names are left of the area and values right of their bars: the page leaves room for both.

    Args:
        full: the value of a bar as wide as the area; None takes the largest.
    """
    full = full or max((bar.value for bar in bars if bar.value is not None), default=0.0) or 1.0
    parts = [opening(ident, title, description, str(_BAR_STEP * len(bars)))]
    for index, bar in enumerate(bars):
        top = index * _BAR_STEP
        middle = f'y="{top + _BAR_STEP // 2}" dy="4"'
        parts.append(
            f'<text class="tick" x="-8" {middle} text-anchor="end">{text(bar.name)}</text>'
        )
        if bar.value is None:
            parts.append(f'<text class="tick" x="2" {middle}>{text(bar.shown)}</text>')
            continue
        width = percent(min(1.0, max(_SLIVER, bar.value / full)))
        parts.append(
            f'<g class="{series_class(bar.run)}"><rect class="bar" x="0" y="{top + 3}" '
            f'width="{width}" height="{_BAR_STEP - 6}"><title>{text(bar.name)}: {text(bar.shown)}'
            f'</title></rect><text class="value" x="{width}" dx="6" {middle}>'
            f"{text(bar.shown)}</text></g>"
        )
    return Svg("".join(parts) + "</svg>")


def path(x: Scale, y: Scale, line: Line) -> str:
    """The `d` attribute of a curve in inner coordinates; an isolated point becomes a dot."""
    parts: list[str] = []
    pen = False
    before = (0, 0)
    for place, value in zip(line.x, line.y, strict=True):
        if not math.isfinite(value) or (y.log and value <= 0):
            pen = False
            continue
        # Values outside the axis leave the area and are clipped.
        column = round(x.at(place) * GRID)
        row = round(max(-3.0, min(4.0, 1 - y.at(value))) * GRID)
        right, down = column - before[0], row - before[1]
        if not pen:
            parts.append(f"M{column} {row}h0")
        elif line.style == "step":
            parts.append(f"h{right}v{down}" if down else f"h{right}")
        else:
            parts.append(f"l{right} {down}" if down >= 0 else f"l{right}{down}")
        pen, before = True, (column, row)
    return "".join(parts)


def dots(
    run: int, places: Iterable[tuple[float, float, str]], radius: float = 4, css: str = "dots"
) -> str:
    """Dots of a run at fractions of width and height, each with a tooltip; `css`: dots or best."""
    circles = "".join(
        f'<circle cx="{percent(x)}" cy="{percent(1 - y)}" r="{radius:g}">'
        f"<title>{text(title)}</title></circle>"
        for x, y, title in places
    )
    return f'<g class="{series_class(run)} {css}">{circles}</g>'


def triangles(run: int, places: Iterable[tuple[float, float, str]]) -> str:
    """Triangles that point down, for scores that do not rise; not distorted by the width."""
    marks = "".join(
        f'<svg x="{percent(x)}" y="{percent(1 - y)}"><polygon points="-7,-5 7,-5 0,8">'
        f"<title>{text(title)}</title></polygon></svg>"
        for x, y, title in places
    )
    return f'<g class="run{run} fallen">{marks}</g>'


def label(
    x: float, y: float, content: str, css: str, *, dx: float = 0, dy: float = 0, anchor: str = ""
) -> str:
    """Text at fractions of the area, shifted by pixels."""
    place = anchor or ("end" if x > 0.7 else "start")
    return (
        f'<text class="{css}" x="{percent(x)}" y="{percent(1 - y)}" '
        f'dx="{-dx if place == "end" else dx:g}" dy="{dy:g}" text-anchor="{place}">'
        f"{text(content)}</text>"
    )


def rule(css: str, *, x: float | None = None, y: float | None = None, top: float = 1) -> str:
    """A line across the area at a height `y`, or up from the axis at `x` to a height `top`."""
    if y is not None:
        height = percent(1 - y)
        return f'<line class="{css}" x1="0" x2="100%" y1="{height}" y2="{height}"/>'
    place = percent(x or 0)
    return f'<line class="{css}" x1="{place}" x2="{place}" y1="100%" y2="{percent(1 - top)}"/>'


def opening(ident: str, title: str, description: str, height: str) -> str:
    return (
        f'<svg width="100%" height="{height}" role="img" '
        f'aria-labelledby="{ident}-title {ident}-desc">'
        f'<title id="{ident}-title">{text(title)}</title>'
        f'<desc id="{ident}-desc">{text(description)}</desc>'
    )


def _vertical_axis(y: Scale, labels: Callable[[Sequence[float]], list[str]], name: str) -> str:
    """Ticks with lines across the area, and the name above, from the left edge of the labels."""
    ticks = y.ticks()
    heights = [round((1 - y.at(tick)) * GRID) for tick in ticks]
    names = "".join(
        f'<text class="tick" x="-8" y="{percent(1 - y.at(tick))}" dy="4" text-anchor="end">'
        f"{name}</text>"
        for tick, name in zip(ticks, labels(ticks), strict=True)
    )
    rules = "".join(f"M0 {height}h{GRID}" for height in heights)
    base = f'<path class="base" d="M0 {GRID}h{GRID}"/>'
    name = f"{name}, log scale" if y.log else name
    names += f'<text class="tick axis" x="-46" y="0" dy="-14">{text(name)}</text>'
    return names + _stretched(f'<path class="grid" d="{rules}"/>{base}', "rules")


def _stretched(content: str, css: str) -> str:
    """The inner svg, of GRID x GRID coordinates, stretched to the area."""
    return f'<svg class="{css}" width="100%" height="100%" {STRETCHED}>{content}</svg>'


def _hits(x: Scale, hits: Sequence[tuple[float, str]]) -> str:
    """Invisible columns with tooltips."""
    if not hits:
        return ""
    places = [min(1.0, max(0.0, x.at(place))) for place, _ in hits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(places)), 1.0]
    return "".join(
        f'<rect class="hit" x="{percent(left)}" width="{percent(right - left)}" '
        f'height="100%"><title>{text(content)}</title></rect>'
        for (_, content), left, right in zip(hits, edges[:-1], edges[1:], strict=True)
    )


def percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _anchor(share: float) -> str:
    return "end" if share > 0.97 else "middle"
