"""The kinds of objects: polygons around the centre, y downwards, for a radius of 1."""

import math

Points = list[tuple[float, float]]
Part = tuple[Points, bool]  # corners, and whether they are cut out of the parts before
TILT = 9.0  # degrees, the largest rotation of an object
_REACH = 1.08  # half the width and height that the place of a rotated object has room for

# What a caption may call each kind.
NOUNS: dict[str, tuple[str, ...]] = {
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
    "oval": ("oval", "ellipse"),
    "dome": ("dome", "half circle"),
    "arrow": ("arrow",),
    "hourglass": ("hourglass",),
    "bow": ("bow", "bow tie"),
    "drop": ("drop", "teardrop"),
    "leaf": ("leaf",),
    "flower": ("flower", "blossom"),
    "tree": ("tree", "fir tree"),
    "mushroom": ("mushroom",),
    "cloud": ("cloud",),
    "bolt": ("lightning bolt", "flash"),
    "house": ("house", "hut"),
    "window": ("window",),
    "ladder": ("ladder",),
    "table": ("table",),
    "chair": ("chair",),
    "mug": ("mug", "cup"),
    "bottle": ("bottle",),
    "umbrella": ("umbrella", "parasol"),
    "key": ("key",),
    "hammer": ("hammer",),
    "gear": ("gear", "cogwheel"),
    "crown": ("crown",),
    "flag": ("flag", "banner"),
    "boat": ("boat", "sailing boat"),
    "car": ("car",),
    "rocket": ("rocket",),
    "fish": ("fish",),
    "cat": ("cat", "cat's head"),
    "rabbit": ("rabbit", "rabbit's head"),
    "snowman": ("snowman",),
}


def _regular(corners: int, radius: float = 1.0, start: float = 0.0) -> Points:
    angles = [math.tau * (start + i) / corners for i in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _oval(x: float, y: float, width: float, height: float) -> Points:
    """Of half axes `width` and `height`."""
    return [(x + width * a, y + height * b) for a, b in _regular(40)]


def _disc(x: float, y: float, radius: float) -> Points:
    return _oval(x, y, radius, radius)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _dome(y: float, width: float, height: float) -> Points:
    """The upper half of an ellipse whose base is at `y`."""
    angles = [math.pi * i / 24 for i in range(25)]
    return [(-width * math.cos(angle), y - height * math.sin(angle)) for angle in angles]


def _mirrored(points: Points) -> Points:
    return [(-x, y) for x, y in points]


def _around(points: Points, count: int) -> list[Points]:
    """Copies rotated about the centre."""
    angles = [math.tau * i / count for i in range(count)]
    return [
        [(x * math.cos(t) - y * math.sin(t), x * math.sin(t) + y * math.cos(t)) for x, y in points]
        for t in angles
    ]


def _star() -> Points:
    pairs = zip(_regular(5, 1.15), _regular(5, 0.48, 0.5), strict=True)
    return [point for pair in pairs for point in pair]


def _heart() -> Points:
    points = []
    for i in range(60):
        t = math.tau * i / 60
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 15.5, -(y + 2.5) / 15.5))
    return points


def _drop() -> Points:
    """Round below, with a tip above."""
    round_part = [(x, y) for x, y in _disc(0, 0.3, 0.75) if y > 0]
    return [(0, -1.15), *sorted(round_part, key=lambda p: math.atan2(p[0], p[1] - 0.3))[::-1]]


def _leaf() -> Points:
    """Two arcs between two tips."""
    arc = [(0.62 * math.sin(math.pi * i / 20), -1.1 + 1.9 * i / 20) for i in range(21)]
    return [*arc, *_mirrored(arc)[::-1]]


def _solid(*shapes: Points) -> list[Part]:
    return [(points, False) for points in shapes]


def _holes(*shapes: Points) -> list[Part]:
    return [(points, True) for points in shapes]


_RUNGS = [_box(-0.5, y, 0.5, y + 0.2) for y in (-0.85, -0.3, 0.25, 0.8)]
_PANES = [_box(x, y, x + 0.62, y + 0.62) for x in (-0.71, 0.09) for y in (-0.71, 0.09)]
_CROWN = [(-0.95, -0.8), (-0.5, -0.1), (0, -0.95), (0.5, -0.1), (0.95, -0.8), (0.85, 0.8)]
_BOLT = [(0.25, -1.1), (-0.65, 0.15), (-0.08, 0.15), (-0.3, 1.1), (0.65, -0.25), (0.08, -0.25)]
_ARROW = [(0, -1.1), (0.85, -0.1), (0.32, -0.1), (0.32, 1.0)]
_SAIL = [(-0.1, -1.1), (-0.1, 0.3), (-0.85, 0.3)]
_SECOND_SAIL = [(0.05, -0.9), (0.05, 0.3), (0.8, 0.3)]
_HULL = [(-1.05, 0.42), (1.05, 0.42), (0.65, 0.95), (-0.65, 0.95)]
_CABIN = [(-0.6, -0.1), (-0.35, -0.6), (0.35, -0.6), (0.65, -0.1)]
_EAR = [(-0.8, -0.2), (-0.75, -1.1), (-0.1, -0.6)]
_FIN = [(-0.45, 0.3), (-0.9, 1.0), (-0.3, 0.75)]

_DRAWN: dict[str, list[Part]] = {
    "circle": _solid(_regular(48)),
    "square": _solid(_regular(4, 1.24, 0.5)),
    "triangle": _solid([(x, y + 0.15) for x, y in _regular(3, 1.17)]),
    "ring": [*_solid(_regular(48)), *_holes(_regular(48, 0.55))],
    "cross": _solid(_box(-0.36, -1.05, 0.36, 1.05), _box(-1.05, -0.36, 1.05, 0.36)),
    "star": _solid(_star()),
    "diamond": _solid([(0.78 * x, y) for x, y in _regular(4, 1.16)]),
    "hexagon": _solid(_regular(6, 1.08, 0.5)),
    "heart": _solid(_heart()),
    "crescent": [*_solid(_disc(0.15, 0, 1.05)), *_holes(_disc(0.65, -0.12, 0.85))],
    "oval": _solid(_oval(0, 0, 1.1, 0.66)),
    "dome": _solid(_dome(0.5, 1.1, 1.1)),
    "arrow": _solid([*_ARROW, *_mirrored(_ARROW)[::-1]]),
    "hourglass": _solid([(-0.75, -1), (0.75, -1), (0.12, 0), (0.75, 1), (-0.75, 1), (-0.12, 0)]),
    "bow": _solid([(-1, -0.75), (0, -0.14), (1, -0.75), (1, 0.75), (0, 0.14), (-1, 0.75)]),
    "drop": _solid(_drop()),
    "leaf": _solid(_leaf(), _box(-0.08, 0.6, 0.08, 1.15)),
    "flower": [*_solid(*_around(_disc(0, -0.68, 0.42), 5)), *_holes(_disc(0, 0, 0.28))],
    "tree": _solid([(0, -1.15), (0.9, 0.6), (-0.9, 0.6)], _box(-0.2, 0.5, 0.2, 1.1)),
    "mushroom": _solid(_dome(0.1, 1.05, 1.05), _box(-0.3, 0, 0.3, 1.0)),
    "cloud": _solid(_disc(-0.6, 0.2, 0.45), _disc(0, -0.15, 0.62), _disc(0.6, 0.15, 0.5)),
    "bolt": _solid(_BOLT),
    "house": [
        *_solid([(-1, -0.1), (0, -1.1), (1, -0.1)], _box(-0.75, -0.15, 0.75, 0.95)),
        *_holes(_box(-0.2, 0.3, 0.2, 0.96)),
    ],
    "window": [*_solid(_box(-0.9, -0.9, 0.9, 0.9)), *_holes(*_PANES)],
    "ladder": _solid(_box(-0.65, -1.1, -0.4, 1.1), _box(0.4, -1.1, 0.65, 1.1), *_RUNGS),
    "table": _solid(
        _box(-1.1, -0.6, 1.1, -0.2), _box(-0.9, -0.3, -0.55, 0.85), _box(0.55, -0.3, 0.9, 0.85)
    ),
    "chair": _solid(
        _box(-0.7, -1.1, -0.35, 1.1), _box(-0.6, -0.05, 0.75, 0.3), _box(0.4, 0.2, 0.75, 1.1)
    ),
    "mug": [
        *_solid(_disc(0.5, 0, 0.6)),
        *_holes(_disc(0.5, 0, 0.32)),
        *_solid(_box(-0.85, -0.85, 0.5, 0.85)),
    ],
    "bottle": _solid(_box(-0.22, -1.15, 0.22, -0.2), _dome(0, 0.55, 0.5), _box(-0.55, 0, 0.55, 1)),
    "umbrella": _solid(_dome(0.1, 1.15, 1.1), _box(-0.1, 0, 0.1, 1.0), _box(0, 0.8, 0.45, 1.0)),
    "key": [
        *_solid(_disc(-0.55, 0, 0.58), _box(-0.2, -0.15, 1.15, 0.15)),
        *_solid(_box(0.85, 0, 1.1, 0.55), _box(0.45, 0, 0.7, 0.45)),
        *_holes(_disc(-0.55, 0, 0.28)),
    ],
    "hammer": _solid(_box(-0.85, -1, 0.85, -0.4), _box(-0.18, -0.5, 0.18, 1.1)),
    "gear": [
        *_solid(_disc(0, 0, 0.78), *_around(_box(-0.17, -1.1, 0.17, -0.6), 8)),
        *_holes(_disc(0, 0, 0.34)),
    ],
    "crown": _solid([*_CROWN, (-0.85, 0.8)]),
    "flag": _solid(_box(-0.8, -1.1, -0.55, 1.1), _box(-0.6, -1.05, 0.95, 0.15)),
    "boat": _solid(_SAIL, _SECOND_SAIL, _HULL),
    "car": _solid(
        _CABIN, _box(-1.1, -0.15, 1.1, 0.4), _disc(-0.55, 0.45, 0.33), _disc(0.55, 0.45, 0.33)
    ),
    "rocket": [
        *_solid(_oval(0, -0.15, 0.5, 1.0), _FIN, _mirrored(_FIN), _box(-0.25, 0.6, 0.25, 1.0)),
        *_holes(_disc(0, -0.35, 0.2)),
    ],
    "fish": [
        *_solid(_oval(-0.2, 0, 0.85, 0.6), [(0.45, 0), (1.1, -0.65), (1.1, 0.65)]),
        *_holes(_disc(-0.6, -0.12, 0.14)),
    ],
    "cat": [
        *_solid(_disc(0, 0.2, 0.85), _EAR, _mirrored(_EAR)),
        *_holes(_disc(-0.32, 0.1, 0.15), _disc(0.32, 0.1, 0.15)),
    ],
    "rabbit": [
        *_solid(
            _disc(0, 0.45, 0.65), _oval(-0.32, -0.5, 0.22, 0.68), _oval(0.32, -0.5, 0.22, 0.68)
        ),
        *_holes(_disc(-0.25, 0.35, 0.12), _disc(0.25, 0.35, 0.12)),
    ],
    "snowman": _solid(_disc(0, 0.45, 0.68), _disc(0, -0.5, 0.48), _box(-0.4, -1.15, 0.4, -0.8)),
}


def _fitted(parts: list[Part]) -> list[Part]:
    """The parts, scaled down where they would reach farther than _REACH when rotated."""
    angles = [math.radians(angle) for angle in (-TILT, 0.0, TILT)]
    corners = [corner for points, is_hole in parts if not is_hole for corner in points]
    reach = max(
        max(abs(x * math.cos(t) - y * math.sin(t)), abs(x * math.sin(t) + y * math.cos(t)))
        for x, y in corners
        for t in angles
    )
    scale = min(1.0, _REACH / reach)
    return [([(scale * x, scale * y) for x, y in points], is_hole) for points, is_hole in parts]


PARTS = {kind: _fitted(parts) for kind, parts in _DRAWN.items()}
