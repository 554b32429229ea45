"""Growth curves: how the similarity of an image and its caption moves as the caption grows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from himo.evaluate.metrics import growth_correlation
from himo.report.figures import Table
from himo.report.runs import Curve, Run
from himo_charts.scales import Scale, finite_only, fit, number
from himo_charts.svg import Line, Svg, dots, line_chart, path, triangles


@dataclass(frozen=True)
class Example:
    """One image with its caption, and the scores of the runs that scored it (run, scores)."""

    image: str
    thumbnail: str | None
    segments: tuple[str, ...]
    scores: tuple[tuple[int, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Segment:
    """A part of a caption; `shade` is the opacity of its ground."""

    words: str
    shade: str


@dataclass(frozen=True)
class Verdict:
    """Whether the score of a run falls at each k from 2, and that in words."""

    run: int
    name: str
    order: Sequence[tuple[int, bool]]
    words: str


@dataclass(frozen=True)
class Card:
    """What a page shows of an example; `views` are (class, chart), without one None."""

    image: str
    thumbnail: str | None
    segments: Sequence[Segment]
    views: Sequence[tuple[str, Svg | None]]
    verdicts: Sequence[Verdict]
    table: Table


def examples(runs: Sequence[Run], at_most: int) -> list[Example]:
    """The images that most runs scored, in the order of the first run that did.

    The curves of several runs belong together where image and segments are the same.
    """
    found: dict[tuple[str, tuple[str, ...]], list[tuple[int, Curve]]] = {}
    for index, run in enumerate(runs):
        for curve in run.curves:
            shared = found.setdefault((curve.image, curve.segments), [])
            if all(other != index for other, _ in shared):
                shared.append((index, curve))
    chosen = sorted(found.items(), key=lambda item: -len(item[1]))[:at_most]
    return [
        Example(
            image,
            next((curve.thumbnail for _, curve in shared if curve.thumbnail), None),
            segments,
            tuple((index, curve.scores) for index, curve in shared),
        )
        for (image, segments), shared in chosen
    ]


def falls(scores: Sequence[float]) -> list[int]:
    """The k, from 2, at which the score does not rise: s_(k-1) >= s_k, or one is not finite."""
    return [k for k in range(2, len(scores) + 1) if not scores[k - 2] < scores[k - 1]]


def pearson(scores: Sequence[float]) -> float:
    """HiMo@K of one image, at least two scores; NaN where one of them is not finite."""
    if len(finite_only(scores)) < len(scores):
        return math.nan
    return growth_correlation(torch.tensor([scores], dtype=torch.float64)).item()


def normalised(scores: Sequence[float]) -> list[float]:
    """Scores moved to 0 for the lowest and 1 for the highest; a constant series to 0.5."""
    finite = finite_only(scores)
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        return [0.5 if math.isfinite(score) else math.nan for score in scores]
    return [(s - low) / (high - low) if math.isfinite(s) else math.nan for s in scores]


def card(ident: str, example: Example, names: Sequence[str]) -> Card:
    """One example: the image, the caption with its segments, the curves, the numbers.

    Args:
        ident: unique on the page.
        names: of the runs.
    """
    count = len(example.segments)
    # One hue that deepens with k: the tick marks of the chart count the same segments.
    segments = [
        Segment(segment.strip(), f"{0.07 + 0.2 * k / max(1, count - 1):.3f}")
        for k, segment in enumerate(example.segments)
    ]
    table = Table(
        ["k", *(names[run] for run, _ in example.scores)],
        [
            [
                str(k),
                *(
                    f"{number(scores[k - 1])}{' ▼' if k in falls(scores) else ''}"
                    for _, scores in example.scores
                ),
            ]
            for k in range(1, count + 1)
        ],
        "Cosine similarity of the image and the first k segments; ▼ where it does not rise.",
    )
    return Card(
        example.image,
        example.thumbnail,
        segments,
        [
            ("raw" if raw else "normalised", _view(ident, example, names, raw=raw))
            for raw in (False, True)
        ],
        [_verdict(run, scores, names[run]) for run, scores in example.scores],
        table,
    )


def _view(ident: str, example: Example, names: Sequence[str], *, raw: bool) -> Svg | None:
    """The curves over k, as cosines or each between its own lowest and highest score."""
    count = len(example.segments)
    css = "raw" if raw else "normalised"
    what = "Cosine similarity" if raw else "Normalised similarity"
    curves = [
        (run, scores, list(scores) if raw else normalised(scores)) for run, scores in example.scores
    ]
    y = fit(value for _, _, values in curves for value in values)
    if y is None:
        return None
    if not raw:
        y = Scale(-0.08, 1.08)
    x = Scale(0.75, count + 0.25)
    places = range(1, count + 1)
    over = ""
    for run, scores, values in curves:
        fallen = falls(scores)
        risen_at, fallen_at = [], []
        for k, value in zip(places, values, strict=True):
            if not math.isfinite(value):
                continue
            told = f"{names[run]}, k = {k}: {number(scores[k - 1])}"
            if k in fallen:
                told += f", not above k = {k - 1} ({number(scores[k - 2])})"
                fallen_at.append((x.at(k), y.at(value), told))
            else:
                risen_at.append((x.at(k), y.at(value), told))
        over += dots(run, risen_at) + triangles(run, fallen_at)
    halo = "".join(
        f'<path class="run{run} fall" d="{path(x, y, Line(run, (k - 1, k), values[k - 2 : k]))}"/>'
        for run, scores, values in curves
        for k in falls(scores)
    )
    return line_chart(
        f"{ident}-{css}",
        f"{what} of {example.image} as its caption grows",
        "; ".join(
            f"{names[run]}: {', '.join(number(score) for score in scores)}"
            for run, scores, _ in curves
        ),
        x,
        y,
        [Line(run, places, values) for run, _, values in curves],
        x_label="segments of the caption read, k",
        over=over,
        under=halo,
        x_ticks=list(places)[:: math.ceil(count / 12)],
    )


def _verdict(run: int, scores: Sequence[float], name: str) -> Verdict:
    fallen = falls(scores)
    words = "rises with every segment"
    if fallen:
        words = f"does not rise at {', '.join(str(k) for k in fallen)}"
    if len(scores) > 3:
        words += f", ρ = {number(pearson(scores), 3)}"
    return Verdict(run, name, [(k, k in fallen) for k in range(2, len(scores) + 1)], words)
