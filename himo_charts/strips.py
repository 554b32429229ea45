"""Strips of signs: whether a series of scores rises at each of its steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from himo_charts.svg import Svg, label, opening, percent, series_class, text

_ROW = 46  # pixels of a strip with its name above
_TOP, _HEIGHT = 20, 18  # of the cells in it
_MOST_SIGNS = 16  # cells that are wide enough for a sign, also on a phone
_MOST_NUMBERS = 12
_LONGEST_NAME = 24  # characters


@dataclass(frozen=True)
class Strip:
    """One series: its run, the name and the words above, and whether each step falls."""

    run: int
    name: str
    words: str
    falls: Sequence[bool]


def order_strips(ident: str, title: str, description: str, strips: Sequence[Strip]) -> Svg:
    """A row of cells for each series: full and signed < where it rises, low and signed ≥ elsewhere.

    Args:
        ident: unique on the page.
        strips: at least one, all with the same number of steps, at least one.
    """
    steps = len(strips[0].falls)
    parts = [opening(ident, title, description, str(_ROW * len(strips)))]
    for row, strip in enumerate(strips):
        top = row * _ROW
        name = strip.name
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 1]}…"
        cells = "".join(
            _cell(place / steps, 1 / steps, top + _TOP, falls, place + 2, steps <= _MOST_SIGNS)
            for place, falls in enumerate(strip.falls)
        )
        parts.append(
            f'<g class="{series_class(strip.run)} order">'
            f'<text class="run" x="0" y="{top + 13}">{text(name)}</text>'
            f'<text class="verdict" x="100%" y="{top + 13}" text-anchor="end">{text(strip.words)}'
            f"</text>{cells}</g>"
        )
    for k in range(0, steps + 1, math.ceil(steps / _MOST_NUMBERS)):
        anchor = "start" if k == 0 else "end" if k == steps else "middle"
        parts.append(label(k / steps, 0, str(k + 1), "tick", dy=12, anchor=anchor))
    parts.append(label(1, 0, "segments of the caption read, k", "tick", dy=30, anchor="end"))
    return Svg("".join(parts) + "</svg>")


def _cell(left: float, width: float, top: int, falls: bool, k: int, signed: bool) -> str:
    height = _HEIGHT // 2 if falls else _HEIGHT
    css, sign = ("falls", "≥") if falls else ("rises", "<")
    told = "does not rise" if falls else "rises"
    mark = ""
    if signed:
        place = f'x="{percent(left + width / 2)}" y="{top + 13}" text-anchor="middle"'
        mark = f'<text class="sign" {place}>{text(sign)}</text>'
    return (
        f'<rect class="{css}" x="{percent(left)}" y="{top + _HEIGHT - height}" '
        f'width="{percent(0.97 * width)}" height="{height}">'
        f"<title>k = {k}: {told}</title></rect>{mark}"
    )
