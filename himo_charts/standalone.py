"""A chart of a page as an SVG file of its own: light colours, no variables, a legend."""

import re
from collections.abc import Sequence

from himo_charts.svg import COLOURS, GRID, STRETCHED, colour_class, style, text

# Pixels around the plot area, as on a page: axis names above and below, tick labels at the left.
_TOP, _RIGHT, _BOTTOM, _LEFT = 28, 22, 44, 58
_WIDTH = 420  # of the plot area
_LEGEND_ROW, _LETTER = 20, 7.2  # pixels; of a letter about the width
_FONT = 'font-family: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif;'

_CHART = re.compile(
    r'<svg width="100%" height="(\d+)" (role="img" aria-labelledby="([^"]+?)-title)'
)
_TAG = re.compile(r"<svg\b|</svg>")
_HITS = re.compile(r'<rect class="hit".*?</rect>', re.DOTALL)
_PATH = re.compile(r'(?<= )d="([^"]+)"')
_COMMAND = re.compile(r"([Mlhv])([^Mlhv]*)")
_NUMBER = re.compile(r"-?\d+")
_ROOT = re.compile(r":root\s*\{(.*?)\}", re.DOTALL)
_VARIABLE = re.compile(r"(--[\w-]+):\s*([^;]+);")
_DARK = re.compile(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}")


def charts_of(page: str) -> dict[str, str]:
    """The charts on a page that this package drew, by their names, in the page's order."""
    found = {}
    for start in _CHART.finditer(page):
        depth, end = 0, len(page)
        for tag in _TAG.finditer(page, start.start()):
            depth += 1 if tag[0] == "<svg" else -1
            if depth == 0:
                end = tag.end()
                break
        found[start[3]] = page[start.start() : end]
    return found


def standalone(chart: str, names: Sequence[str]) -> str:
    """A file of a chart, which programs without CSS variables and a browser's page show too.

    Args:
        chart: one of `charts_of`.
        names: of the runs; the legend has those that the chart draws, where it draws several.
    """
    opening = _CHART.match(chart)
    if opening is None:
        raise ValueError(f"standalone: expected a chart of himo_charts, got {chart[:40]!r}")
    height = int(opening[1])
    drawn = [run for run in range(len(names)) if re.search(rf'\brun{run}\b[^"]*"', chart)]
    named = ' order"' in chart  # strips have their names above
    legend = _legend(drawn, names) if len(drawn) > 1 and not named else []
    top = _TOP + _LEGEND_ROW * len(legend)
    area = f'<svg x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{height}" {opening[2]}'
    body = _HITS.sub("", area + chart[opening.end() :])
    body = _PATH.sub(lambda found: f'd="{_in_pixels(found[1], height)}"', body)
    body = body.replace(STRETCHED, "")
    width, whole = _LEFT + _WIDTH + _RIGHT, top + height + _BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{whole}" '
        f'viewBox="0 0 {width} {whole}"><style>{_plain_style(len(names))}</style>'
        f'<rect width="{width}" height="{whole}" fill="#ffffff"/>{"".join(legend)}{body}</svg>\n'
    )


def _in_pixels(path: str, height: int) -> str:
    """A path of the stretched grid in pixels: not every program keeps a stretched line's width."""
    across, down = _WIDTH / GRID, height / GRID
    scales = {"M": (across, down), "l": (across, down), "h": (across,), "v": (down,)}
    parts = []
    for command, numbers in _COMMAND.findall(path):
        values = zip(_NUMBER.findall(numbers), scales[command], strict=True)
        parts.append(command + " ".join(f"{round(int(x) * scale, 2):g}" for x, scale in values))
    return "".join(parts)


def _legend(drawn: Sequence[int], names: Sequence[str]) -> list[str]:
    """Rows of swatches with names, as wide as the plot area."""
    rows: list[str] = [""]
    place = 0.0
    for run in drawn:
        wide = 34 + _LETTER * len(names[run])
        if place and place + wide > _WIDTH:
            rows.append("")
            place = 0.0
        x, y = _LEFT + place, 14 + _LEGEND_ROW * (len(rows) - 1)
        rows[-1] += (
            f'<g class="{colour_class(run)}"><rect class="bar" x="{x:g}" y="{y - 6}" width="18" '
            f'height="4"/></g><text x="{x + 24:g}" y="{y}">{text(names[run])}</text>'
        )
        place += wide
    return rows


def _plain_style(runs: int) -> str:
    """The charts' style in light colours, with every variable replaced by its value."""
    light = _DARK.sub("", style())
    values = dict(_VARIABLE.findall(_ROOT.search(light)[1]))  # type: ignore[index]
    plain = re.sub(r"var\((--[\w-]+)\)", lambda found: values[found[1]], _ROOT.sub("", light))
    again = "".join(f".run{run}.solid {{ stroke-dasharray: 7 4; }}" for run in range(COLOURS, runs))
    return f"svg {{ {_FONT} }}\n{plain}{again}"
