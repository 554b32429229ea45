"""Random scenes of simple objects, their pictures, and captions from general to detailed.

A scene has two to five objects on a background. The first sentence of its caption gives their
number and the background; each further one adds a detail: the largest object, the others by size,
the pattern of the background, a frame, an outline. Together they describe the whole picture, so a
model can learn to tell pictures apart by their captions, and a full caption from a shorter one.
"""

import math
import random
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

_RGB = tuple[int, int, int]
_Points = list[tuple[float, float]]

COLOURS: dict[str, _RGB] = {
    "red": (216, 40, 44),
    "orange": (245, 130, 20),
    "yellow": (250, 212, 50),
    "green": (44, 158, 70),
    "turquoise": (30, 178, 178),
    "blue": (42, 92, 220),
    "purple": (128, 62, 190),
    "pink": (250, 120, 180),
    "brown": (124, 76, 44),
    "black": (30, 30, 34),
    "white": (250, 250, 250),
    "grey": (132, 134, 140),
}
BACKGROUNDS: dict[str, _RGB] = {
    "pale blue": (206, 226, 246),
    "cream": (250, 240, 214),
    "mint green": (196, 234, 208),
    "lavender": (220, 208, 242),
    "peach": (252, 214, 190),
    "light grey": (220, 221, 226),
    "sand": (216, 194, 150),
    "sky blue": (130, 192, 234),
    "rose": (232, 160, 172),
    "olive": (112, 114, 54),
    "navy blue": (26, 36, 76),
    "dark green": (22, 64, 46),
    "maroon": (84, 22, 36),
    "charcoal": (54, 56, 62),
}
_CONTRAST = 115  # least distance in RGB between an object and its background

PATTERNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "horizontal": ("horizontal stripes", "stripes that run from left to right"),
    "vertical": ("vertical stripes", "stripes that run from top to bottom"),
    "diagonal": ("diagonal stripes", "slanted stripes"),
    "checks": ("a checkerboard pattern", "checks"),
    "dots": ("small dots", "a dotted pattern"),
}
SIZES: dict[str, tuple[float, tuple[str, ...]]] = {  # radius as a fraction of the side; words
    "large": (0.157, ("large", "big", "huge")),
    "medium": (0.116, ("medium-sized", "middle-sized")),
    "small": (0.080, ("small", "little", "tiny")),
}
_CENTRES = (0.2, 0.5, 0.8)  # of the cells of a 3 x 3 grid; a large and a medium object fit
_JITTER = 0.012
PLACES = (
    ("in the top left corner", "at the upper left"),
    ("at the top", "in the middle of the upper edge"),
    ("in the top right corner", "at the upper right"),
    ("on the left side", "at the middle of the left edge"),
    ("in the centre", "in the middle of the picture"),
    ("on the right side", "at the middle of the right edge"),
    ("in the bottom left corner", "at the lower left"),
    ("at the bottom", "in the middle of the lower edge"),
    ("in the bottom right corner", "at the lower right"),
)
SHAPES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "star": ("star", "five-pointed star"),
    "diamond": ("diamond", "rhombus"),
    "hexagon": ("hexagon", "six-sided shape"),
    "heart": ("heart",),
    "crescent": ("crescent", "crescent moon"),
}
_OUTLINES = ("white", "black", "yellow")
_FRAMES = ("white", "black", "red", "blue")
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_MAX_SENTENCES = 8

_SUPERSAMPLING = 4


class Thing(NamedTuple):
    """One object of a scene."""

    shape: str
    colour: str
    size: str
    place: int  # cell of the grid, row by row from the top left
    outline: str | None  # its colour


class Scene(NamedTuple):
    """The facts in a caption. The first object is the largest."""

    background: str
    pattern: str
    frame: str | None  # its colour
    things: tuple[Thing, ...]


def draw_scene(rng: random.Random) -> Scene:
    """A random scene, whose captions have 3 to 8 sentences."""
    background = rng.choice(list(BACKGROUNDS))
    ground = BACKGROUNDS[background]
    colours = [name for name, rgb in COLOURS.items() if math.dist(rgb, ground) >= _CONTRAST]
    count = rng.randint(2, 5)
    details = _MAX_SENTENCES - 1 - count  # most sentences about pattern, frame and outline
    has_outline = rng.random() < 0.4
    frames = [name for name in _FRAMES if math.dist(COLOURS[name], ground) >= _CONTRAST]
    frame = rng.choice(frames) if rng.random() < 0.35 and details > has_outline else None
    has_pattern = rng.random() < 0.6 and details > has_outline + (frame is not None)
    pattern = rng.choice(list(PATTERNS)[1:]) if has_pattern else "plain"
    places = rng.sample(range(len(PLACES)), count)
    kinds = rng.sample([(shape, colour) for shape in SHAPES for colour in colours], count)
    sizes = ["large", *sorted(rng.choice(["medium", "small"]) for _ in range(count - 1))]
    outlines: list[str | None] = [None] * count
    if has_outline:
        outlines[0] = rng.choice([name for name in _OUTLINES if name != kinds[0][1]])
    things = zip(kinds, sizes, places, outlines, strict=True)
    return Scene(background, pattern, frame, tuple(Thing(*k, s, p, o) for k, s, p, o in things))


def caption(scene: Scene, rng: random.Random) -> list[str]:
    """The sentences of a caption, from general to detailed; `rng` chooses the words."""
    pick = rng.choice
    number, ground = _NUMBERS[len(scene.things)], scene.background
    nouns = pick(["shapes", "objects", "figures"])
    behind = pick(["background", "backdrop", "surface"])
    sentences = [
        pick(
            [
                f"{number} {nouns} on {_a(ground)} {behind}",
                f"a picture of {number} {nouns} on {_a(ground)} {behind}",
                f"there are {number} {nouns} on {_a(ground)} {behind}",
                f"on {_a(ground)} {behind} there are {number} {nouns}",
                f"{_a(ground)} {behind} with {number} {nouns} on it",
            ]
        )
    ]
    for position, thing in enumerate(scene.things):
        noun = f"{thing.colour} {pick(SHAPES[thing.shape])}"
        sized = _a(f"{pick(SIZES[thing.size][1])} {noun}")
        place = pick(PLACES[thing.place])
        if position == 0:
            largest = f"the {pick(['largest', 'biggest'])}"
            forms = [
                f"{largest} of them is {_a(noun)} {place}",
                f"{largest} one, {place}, is {_a(noun)}",
                f"{sized} stands out {place}",
                f"{place} there is {sized}, {largest} of all",
            ]
        else:
            forms = [
                f"{sized} is {place}",
                f"{place} there is {sized}",
                f"there is {pick(['also ', ''])}{sized} {place}",
                f"{place} one sees {sized}",
                f"{sized} can be seen {place}",
            ]
        sentences.append(pick(forms))
    if scene.pattern != "plain":
        pattern = pick(PATTERNS[scene.pattern])
        cover = "covers" if pattern.startswith("a ") else "cover"
        sentences.append(pick([f"the {behind} has {pattern}", f"{pattern} {cover} the {behind}"]))
    if scene.frame is not None:
        sentences.append(
            pick(
                [
                    f"a {pick(['thin', 'narrow'])} {scene.frame} frame surrounds the picture",
                    f"the picture has {_a(scene.frame)} frame",
                    f"all around runs {_a(scene.frame)} border",
                ]
            )
        )
    largest_thing = scene.things[0]
    if largest_thing.outline is not None:
        outline = f"{pick(['thick', 'broad'])} {largest_thing.outline} outline"
        name = f"{largest_thing.colour} {pick(SHAPES[largest_thing.shape])}"
        sentences.append(
            pick([f"the {name} has a {outline}", f"a {outline} goes round the {name}"])
        )
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def render(scene: Scene, rng: random.Random, resolution: int) -> Image.Image:
    """A scene as RGB [resolution, resolution]; `rng` shifts and rotates its objects."""
    side = resolution * _SUPERSAMPLING
    ground = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), ground)
    if scene.pattern != "plain":
        # Darker on a light background, lighter on a dark one.
        other = _blend(ground, (0, 0, 0) if sum(ground) > 330 else (255, 255, 255), 0.17)
        image.paste(other, mask=_pattern_mask(scene.pattern, side))
    if scene.frame is not None:
        width = round(0.028 * side)
        edge = (0, 0, side - 1, side - 1)
        ImageDraw.Draw(image).rectangle(edge, outline=COLOURS[scene.frame], width=width)
    for thing in scene.things:
        radius = SIZES[thing.size][0]
        row, column = divmod(thing.place, 3)
        x = (_CENTRES[column] + rng.uniform(-_JITTER, _JITTER)) * side
        y = (_CENTRES[row] + rng.uniform(-_JITTER, _JITTER)) * side
        _paste(image, thing, x, y, radius * side, math.radians(rng.uniform(-9, 9)))
    return image.resize((resolution, resolution), Image.Resampling.BOX)


def _paste(
    image: Image.Image, thing: Thing, x: float, y: float, radius: float, angle: float
) -> None:
    side = image.width
    half = math.ceil(1.25 * radius)
    mask = _shape_mask(thing.shape, half, radius, angle)
    left, top = round(x) - half, round(y) - half
    shift = round(0.012 * side)
    image.paste((0, 0, 0), (left + shift, top + shift), mask.point([i * 0.3 for i in range(256)]))
    colour = COLOURS[thing.colour]
    if thing.outline is not None:
        image.paste(COLOURS[thing.outline], (left, top), mask)
        mask = _shape_mask(thing.shape, half, 0.72 * radius, angle)
    # Lit from above, because flat areas of one colour look like a chart.
    light = Image.linear_gradient("L").resize(mask.size)
    bright, dim = _blend(colour, (255, 255, 255), 0.16), _blend(colour, (0, 0, 0), 0.14)
    shaded = Image.composite(
        Image.new("RGB", mask.size, dim), Image.new("RGB", mask.size, bright), light
    )
    image.paste(shaded, (left, top), mask)


def _shape_mask(shape: str, half: int, radius: float, angle: float) -> Image.Image:
    """A white shape in the centre of a black image of mode L and side 2 * half."""
    mask = Image.new("L", (2 * half, 2 * half))
    draw = ImageDraw.Draw(mask)

    def fill(points: _Points, value: int = 255) -> None:
        cos, sin = math.cos(angle) * radius, math.sin(angle) * radius
        rotated = [(half + x * cos - y * sin, half + x * sin + y * cos) for x, y in points]
        draw.polygon(rotated, fill=value)

    if shape == "ring":
        fill(_regular(48))
        fill([(0.55 * x, 0.55 * y) for x, y in _regular(48)], 0)
    elif shape == "crescent":
        fill([(x + 0.15, y) for x, y in _regular(48, 1.05)])
        fill([(x + 0.65, y - 0.12) for x, y in _regular(48, 0.85)], 0)
    else:
        fill(_OUTLINE_POINTS[shape])
    return mask


def _regular(corners: int, radius: float = 1.0, start: float = 0.0) -> _Points:
    angles = [math.tau * (start + i) / corners for i in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _star() -> _Points:
    pairs = zip(_regular(5, 1.15), _regular(5, 0.48, 0.5), strict=True)
    return [point for pair in pairs for point in pair]


def _heart() -> _Points:
    points = []
    for i in range(60):
        t = math.tau * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 15.5, -(y + 2.5) / 15.5))
    return points


_ARM = 0.36
_QUARTER = [(-_ARM, -1.05), (_ARM, -1.05), (_ARM, -_ARM)]
# Corners around the centre, y downwards, for a radius of 1; the areas are similar.
_OUTLINE_POINTS: dict[str, _Points] = {
    "circle": _regular(48),
    "square": _regular(4, 1.24, 0.5),
    "triangle": [(x, y + 0.15) for x, y in _regular(3, 1.17)],
    "cross": [
        p
        for x, y in [(1, 0), (0, 1), (-1, 0), (0, -1)]
        for p in [(a * x - b * y, a * y + b * x) for a, b in _QUARTER]
    ],
    "star": _star(),
    "diamond": [(0.78 * x, y) for x, y in _regular(4, 1.16)],
    "hexagon": _regular(6, 1.08, 0.5),
    "heart": _heart(),
}


def _pattern_mask(pattern: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    step = side / 6
    if pattern == "dots":
        for i in range(7):
            for j in range(7):
                x, y, r = (i + 0.5 * (j % 2)) * step, j * step, 0.2 * step
                draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        return mask
    for i in range(-6, 6):
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


def _blend(colour: _RGB, other: _RGB, share: float) -> _RGB:
    r, g, b = (round(a + share * (c - a)) for a, c in zip(colour, other, strict=True))
    return r, g, b
