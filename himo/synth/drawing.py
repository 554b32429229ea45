"""Draws a scene: wall and floor, pattern, rail, frame, and its objects with shadow and shading."""

import math
import random

from PIL import Image, ImageChops, ImageDraw

from himo.synth.kinds import PARTS, TILT, Part
from himo.synth.scenes import GROUNDS, HUES, RGB, SIZES, Scene, Thing

_SUPERSAMPLING = 4
_HORIZON = 0.65  # height of the line between wall and floor, below the middle row
_CENTRES = (0.2, 0.5, 0.8)  # of the cells of a 3 x 3 grid; a large and a medium object fit
_JITTER = 0.012
_EDGE, _RAIL = 0.028, 0.024  # widths of frame and rail
_DARK = 330  # sum of the channels below which a colour is lightened, not darkened


def render(scene: Scene, rng: random.Random, resolution: int) -> Image.Image:
    """A scene as RGB [resolution, resolution]; `rng` shifts and rotates its objects."""
    side = resolution * _SUPERSAMPLING
    horizon = round(_HORIZON * side)
    wall = GROUNDS[scene.wall]
    image = Image.new("RGB", (side, side), wall)
    if scene.pattern != "plain":
        image.paste(_shade(wall, 0.17), mask=_pattern_mask(scene.pattern, side, side / 6))
    image.paste(GROUNDS[scene.floor], (0, horizon, side, side))
    draw = ImageDraw.Draw(image)
    if scene.rail is not None:
        draw.rectangle((0, horizon - round(_RAIL * side), side, horizon), fill=HUES[scene.rail])
    if scene.frame is not None:
        edge = (0, 0, side - 1, side - 1)
        draw.rectangle(edge, outline=HUES[scene.frame], width=round(_EDGE * side))
    for thing in scene.things:
        row, column = divmod(thing.place, 3)
        x = (_CENTRES[column] + rng.uniform(-_JITTER, _JITTER)) * side
        y = (_CENTRES[row] + rng.uniform(-_JITTER, _JITTER)) * side
        _paste(image, thing, x, y, math.radians(rng.uniform(-TILT, TILT)))
    return image.resize((resolution, resolution), Image.Resampling.BOX)


def _paste(image: Image.Image, thing: Thing, x: float, y: float, angle: float) -> None:
    radius = SIZES[thing.size][0] * image.width
    half = math.ceil(1.25 * radius)
    mask = _mask(PARTS[thing.kind], half, radius, angle)
    left, top = round(x) - half, round(y) - half
    shift = round(0.012 * image.width)
    image.paste((0, 0, 0), (left + shift, top + shift), mask.point([i * 0.3 for i in range(256)]))
    if thing.outline is not None:
        image.paste(HUES[thing.outline], (left, top), mask)
        mask = _mask(PARTS[thing.kind], half, 0.72 * radius, angle)
    colour = HUES[thing.colour]
    # Lit from above, because flat areas of one colour look like a chart.
    light = Image.linear_gradient("L").resize(mask.size)
    bright, dim = _blend(colour, (255, 255, 255), 0.16), _blend(colour, (0, 0, 0), 0.14)
    shaded = Image.composite(
        Image.new("RGB", mask.size, dim), Image.new("RGB", mask.size, bright), light
    )
    if thing.texture != "plain":
        shaded.paste(_shade(colour, 0.45), mask=_pattern_mask(thing.texture, 2 * half, half / 2.6))
    image.paste(shaded, (left, top), mask)


def _mask(parts: list[Part], half: int, radius: float, angle: float) -> Image.Image:
    """White parts in the centre of a black image of mode L and side 2 * half."""
    mask = Image.new("L", (2 * half, 2 * half))
    draw = ImageDraw.Draw(mask)
    cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
    for points, is_hole in parts:
        rotated = [(half + x * cos - y * sin, half + x * sin + y * cos) for x, y in points]
        draw.polygon(rotated, fill=0 if is_hole else 255)
    return mask


def _pattern_mask(pattern: str, side: int, step: float) -> Image.Image:
    """White stripes, checks or dots that repeat after `step` pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    count = math.ceil(side / step)
    if pattern == "dots":
        for i in range(count + 1):
            for j in range(count + 1):
                x, y, r = (i + 0.5 * (j % 2)) * step, j * step, 0.25 * step
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        return mask
    for i in range(-count, count):
        start, end = i * step, (i + 0.5) * step
        if pattern == "diagonal":
            corners = [(start, 0), (end, 0), (end + side, side), (start + side, side)]
            draw.polygon(corners, fill=255)
        else:
            draw.rectangle((0, start, side, end), fill=255)
    if pattern == "vertical":
        return mask.transpose(Image.Transpose.TRANSPOSE)
    if pattern == "checks":
        return ImageChops.difference(mask, mask.transpose(Image.Transpose.TRANSPOSE))
    return mask


def _shade(colour: RGB, share: float) -> RGB:
    """Darker where the colour is light, lighter where it is dark."""
    return _blend(colour, (0, 0, 0) if sum(colour) > _DARK else (255, 255, 255), share)


def _blend(colour: RGB, other: RGB, share: float) -> RGB:
    r, g, b = (round(a + share * (c - a)) for a, c in zip(colour, other, strict=True))
    return r, g, b
