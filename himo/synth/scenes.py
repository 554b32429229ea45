"""Random scenes of objects between a wall and a floor, and captions from general to detailed.

A scene has two to five objects of different kinds. The first sentence of its caption gives their
number, wall and floor, and the largest object; each further one adds a detail: the place of an
object, its size, colour, texture and where it is from an earlier one, then the pattern of the wall,
a frame, a rail, an outline. Together they describe the whole picture, so a model can learn to tell
pictures apart by their captions, and a full caption from a shorter one.
"""

import math
import random
from typing import NamedTuple

from himo.synth.kinds import NOUNS

RGB = tuple[int, int, int]

HUES: dict[str, RGB] = {
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
GROUNDS: dict[str, RGB] = {  # of wall and floor
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
_CONTRAST = 115  # least distance in RGB between an object and the scene behind it
_GROUND_CONTRAST = 60  # between wall and floor

PATTERNS: dict[str, tuple[str, ...]] = {  # of the wall
    "plain": (),
    "horizontal": ("horizontal stripes", "stripes that run from left to right"),
    "vertical": ("vertical stripes", "stripes that run from top to bottom"),
    "diagonal": ("diagonal stripes", "slanted stripes"),
    "checks": ("a checkerboard pattern", "checks"),
    "dots": ("small dots", "a dotted pattern"),
}
TEXTURES: dict[str, tuple[str, ...]] = {  # of an object
    "plain": (),
    "horizontal": ("striped", "banded"),
    "checks": ("checked", "chequered"),
    "dots": ("spotted", "dotted"),
}
SIZES: dict[str, tuple[float, tuple[str, ...]]] = {  # radius as a fraction of the side; words
    "large": (0.157, ("large", "big", "huge")),
    "medium": (0.116, ("medium-sized", "middle-sized")),
    "small": (0.080, ("small", "little", "tiny")),
}
PLACES = (  # cells of a 3 x 3 grid, row by row
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
FLOOR_ROW = 2  # of the grid; the others are in front of the wall
_OUTLINES = ("white", "black", "yellow")
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_MAX_SENTENCES = 8
_RELATED = 0.5  # share of the objects after the first with a relation


class Thing(NamedTuple):
    """One object of a scene."""

    kind: str
    colour: str
    size: str
    place: int  # cell of the grid, row by row from the top left
    texture: str = "plain"
    outline: str | None = None  # its colour


class Scene(NamedTuple):
    """The facts in a caption. The first object is the largest."""

    wall: str
    floor: str
    things: tuple[Thing, ...]
    pattern: str = "plain"
    frame: str | None = None  # its colour
    rail: str | None = None  # of the line between wall and floor


def draw_scene(rng: random.Random) -> Scene:
    """A random scene, whose captions have 3 to 8 sentences."""
    wall = rng.choice(list(GROUNDS))
    floor = rng.choice(_contrasting(GROUNDS, GROUNDS[wall], _GROUND_CONTRAST))
    count = rng.randint(2, 5)
    places = rng.sample(range(len(PLACES)), count)
    kinds = rng.sample(list(NOUNS), count)
    sizes = ["large", *sorted(rng.choice(["medium", "small"]) for _ in range(count - 1))]
    things = []
    for kind, size, place in zip(kinds, sizes, places, strict=True):
        behind = GROUNDS[floor if place // 3 == FLOOR_ROW else wall]
        colour = rng.choice(_contrasting(HUES, behind, _CONTRAST))
        texture = rng.choice(list(TEXTURES)) if size != "small" else "plain"
        things.append(Thing(kind, colour, size, place, texture))

    details = ["pattern", "frame", "rail", "outline"]
    most = min(
        len(details), _MAX_SENTENCES - 1 - count
    )  # a sentence of each object, and one before
    chosen = rng.sample(details, rng.randint(0, most))
    if "outline" in chosen:
        outline = rng.choice([name for name in _OUTLINES if name != things[0].colour])
        things[0] = things[0]._replace(outline=outline)
    edges = _contrasting(HUES, GROUNDS[wall], _CONTRAST)
    return Scene(
        wall,
        floor,
        tuple(things),
        rng.choice(list(PATTERNS)[1:]) if "pattern" in chosen else "plain",
        rng.choice(edges) if "frame" in chosen else None,
        rng.choice(edges) if "rail" in chosen else None,
    )


def _contrasting(colours: dict[str, RGB], behind: RGB, least: float) -> list[str]:
    return [name for name, rgb in colours.items() if math.dist(rgb, behind) >= least]


def caption(scene: Scene, rng: random.Random) -> list[str]:
    """The sentences of a caption, from general to detailed; `rng` chooses the words."""
    pick = rng.choice
    nouns = [pick(NOUNS[thing.kind]) for thing in scene.things]  # the same in every sentence
    sentences = [_overview(scene, nouns[0], rng), _largest(scene.things[0], nouns[0], rng)]
    for index in range(1, len(scene.things)):
        sentences.append(_another(scene.things, index, nouns, rng))
    if scene.pattern != "plain":
        pattern = pick(PATTERNS[scene.pattern])
        cover = "covers" if pattern.startswith("a ") else "cover"
        sentences.append(pick([f"the wall has {pattern}", f"{pattern} {cover} the wall"]))
    if scene.frame is not None:
        thin = pick(["thin", "narrow"])
        sentences.append(
            pick(
                [
                    f"a {thin} {scene.frame} frame surrounds the picture",
                    f"the picture has {_a(scene.frame)} frame",
                    f"all around runs {_a(scene.frame)} border",
                ]
            )
        )
    if scene.rail is not None:
        rail = f"{scene.rail} {pick(['rail', 'skirting board'])}"
        sentences.append(
            pick([f"{_a(rail)} divides wall and floor", f"between wall and floor runs {_a(rail)}"])
        )
    if scene.things[0].outline is not None:
        outline = f"{pick(['thick', 'broad'])} {scene.things[0].outline} outline"
        sentences.append(
            pick([f"the {nouns[0]} has a {outline}", f"a {outline} goes round the {nouns[0]}"])
        )
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences]


def _overview(scene: Scene, noun: str, rng: random.Random) -> str:
    wall, floor = _a(f"{scene.wall} wall"), _a(f"{scene.floor} floor")
    all_things = f"{_NUMBERS[len(scene.things)]} {rng.choice(['things', 'objects', 'figures'])}"
    largest = _a(f"{scene.things[0].colour} {noun}")
    biggest = rng.choice(["largest", "biggest"])
    return rng.choice(
        [
            f"{all_things} between {wall} and {floor}, the {biggest} {largest}",
            f"{largest} is the {biggest} of {all_things} between {wall} and {floor}",
            f"there are {all_things} with {wall} and {floor}, the {biggest} is {largest}",
            f"{wall}, {floor} and {all_things}, the {biggest} of them {largest}",
        ]
    )


def _largest(thing: Thing, noun: str, rng: random.Random) -> str:
    place, plain = rng.choice(PLACES[thing.place]), thing.texture == "plain"
    texture = "" if plain else rng.choice(TEXTURES[thing.texture])
    how = "" if plain else f"{texture} and "
    return rng.choice(
        [
            f"the {noun} is {how}{rng.choice(['placed', 'seen'])} {place}",
            f"{place} stands the {texture} {noun}" if texture else f"{place} stands the {noun}",
        ]
    )


def _another(things: tuple[Thing, ...], index: int, nouns: list[str], rng: random.Random) -> str:
    """A sentence of an object after the first, often with its relation to an earlier one."""
    thing, place = things[index], rng.choice(PLACES[things[index].place])
    words = [rng.choice(SIZES[thing.size][1]), thing.colour, nouns[index]]
    if thing.texture != "plain":
        words.insert(1, rng.choice(TEXTURES[thing.texture]))
    noun = _a(" ".join(words))
    if rng.random() < _RELATED:
        earlier = rng.randrange(index)
        place += f", {relation(thing, things[earlier])} the {nouns[earlier]}"
        return rng.choice([f"{noun} is {place}", f"there is {noun} {place}"])
    return rng.choice(
        [
            f"{noun} is {place}",
            f"{place} there is {noun}",
            f"there is {rng.choice(['also ', ''])}{noun} {place}",
            f"{place} one sees {noun}",
        ]
    )


def relation(thing: Thing, other: Thing) -> str:
    """Where an object is from another one, in words that "the" and a noun follow."""
    (row, column), (row_of_other, column_of_other) = divmod(thing.place, 3), divmod(other.place, 3)
    down, right = row - row_of_other, column - column_of_other
    if not right:
        return "below" if down > 0 else "above"
    side = "right" if right > 0 else "left"
    if not down:
        return f"to the {side} of"
    return f"{'below' if down > 0 else 'above'} and {side} of"


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
