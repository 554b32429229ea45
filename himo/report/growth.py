"""Growth curves: how the similarity of an image and its caption moves as the caption grows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from himo.evaluate.himo_k import MORE_THAN
from himo.evaluate.metrics import growth_correlation
from himo.report.figures import Table
from himo.report.runs import Curve, Run
from himo_charts.scales import Scale, finite_only, fit, fixed, number
from himo_charts.strips import Strip, order_strips
from himo_charts.svg import Line, Svg, dots, line_chart, path, triangles


@dataclass(frozen=True)
class Example:
    """One image with its caption, and the scores of the runs that scored it (run, scores)."""

    image: str
    thumbnail: str | None
    segments: tuple[str, ...]
    scores: tuple[tuple[int, tuple[float, ...]], ...]


def examples(runs: Sequence[Run], at_most: int) -> list[Example]:
    """The images that most runs scored, in the order of the first run that did.

    Curves of several runs are joined where image and segments are the same.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[int, Curve]] = {}
    for index, run in enumerate(runs):
        for curve in run.curves:
            found.setdefault((curve.image, curve.segments), {}).setdefault(index, curve)
    chosen = sorted(found.items(), key=lambda item: -len(item[1]))[:at_most]
    return [
        Example(
            image,
            next((curve.thumbnail for curve in shared.values() if curve.thumbnail), None),
            segments,
            tuple((index, curve.scores) for index, curve in shared.items()),
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
    """Scores scaled to 0 for the lowest and 1 for the highest; a constant series to 0.5."""
    finite = finite_only(scores)
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low == high:
        return [0.5 if math.isfinite(score) else math.nan for score in scores]
    return [(s - low) / (high - low) if math.isfinite(s) else math.nan for s in scores]


def gains(example: Example) -> list[float | None]:
    """What each segment adds to the similarity, as a share of the range of the scores.

    The mean of the runs whose scores are finite, from -1 to 1. None for the first segment, which
    has nothing before it, and where no run has a score.
    """
    found: list[float | None] = [None]
    curves = [normalised(scores) for _, scores in example.scores]
    for k in range(1, len(example.segments)):
        steps = finite_only(values[k] - values[k - 1] for values in curves)
        found.append(sum(steps) / len(steps) if steps else None)
    return found


def card(ident: str, example: Example, names: Sequence[str]) -> dict[str, Any]:
    """What a page shows of an example: the image, the caption's segments, curves and numbers.

    Args:
        ident: unique on the page.
        names: of the runs.

    Returns:
        `ident`, `segments` as (words, class and opacity of the ground), `views` as (class, chart
        or None), `order` as a chart, and for each run a verdict in words.
    """
    count = len(example.segments)
    rows = []
    for k in range(1, count + 1):
        marked = ((scores[k - 1], k in falls(scores)) for _, scores in example.scores)
        rows.append([str(k), *(f"{number(s)}{' ▼' if fallen else ''}" for s, fallen in marked)])
    return {
        "ident": ident,
        "image": example.image,
        "thumbnail": example.thumbnail,
        "segments": [
            (segment.strip(), *_tint(gain))
            for segment, gain in zip(example.segments, gains(example), strict=True)
        ],
        "views": [
            (css, _view(f"{ident}-{css}", example, names, raw=css == "raw"))
            for css in ("normalised", "raw")
        ],
        "order": _order(f"{ident}-order", example, names),
        "verdicts": [
            {"run": run, "name": names[run], "words": _verdict(scores)}
            for run, scores in example.scores
        ],
        "table": Table(
            ["k", *(names[run] for run, _ in example.scores)],
            rows,
            "Cosine similarity of the image and the first k segments; ▼ where it does not rise.",
        ),
    }


def _tint(gain: float | None) -> tuple[str, str]:
    """The class and the opacity of the ground of a segment."""
    if gain is None:
        return "first", "0"
    return "lowers" if gain <= 0 else "raises", f"{0.06 + 0.34 * min(1.0, abs(gain)):.3f}"


def _view(ident: str, example: Example, names: Sequence[str], *, raw: bool) -> Svg | None:
    """The curves over k, as cosines or each between its own lowest and highest score."""
    curves = [
        (run, scores, list(scores) if raw else normalised(scores)) for run, scores in example.scores
    ]
    y = fit(value for _, _, values in curves for value in values)
    if y is None:
        return None
    if not raw:
        y = Scale(-0.08, 1.08)
    count = len(example.segments)
    x, places = Scale(0.75, count + 0.25), range(1, count + 1)
    over = halo = ""
    for run, scores, values in curves:
        fallen = falls(scores)
        marks: dict[bool, list[tuple[float, float, str]]] = {False: [], True: []}
        for k, value in zip(places, values, strict=True):
            if not math.isfinite(value):
                continue
            told = f"{names[run]}, k = {k}: {number(scores[k - 1])}"
            if k in fallen:
                told += f", not above k = {k - 1} ({number(scores[k - 2])})"
            marks[k in fallen].append((x.at(k), y.at(value), told))
        over += dots(run, marks[False]) + triangles(run, marks[True])
        for k in fallen:
            shape = path(x, y, Line(run, (k - 1, k), values[k - 2 : k]))
            halo += f'<path class="run{run} fall" d="{shape}"/>'
    what = "cosine similarity" if raw else "min–max: 0 = lowest, 1 = highest of each curve"
    return line_chart(
        ident,
        f"Similarity of {example.image} as its caption grows ({what})",
        "; ".join(f"{names[run]}: {', '.join(map(number, scores))}" for run, scores, _ in curves),
        x,
        y,
        [Line(run, places, values) for run, _, values in curves],
        x_label="segments of the caption read, k",
        y_label=what,
        over=over,
        under=halo,
        x_ticks=list(places)[:: math.ceil(count / 12)],
    )


def _order(ident: str, example: Example, names: Sequence[str]) -> Svg | None:
    """Strips that say at which segments the scores rise; None for a single segment."""
    if len(example.segments) < 2:
        return None
    strips = [
        Strip(
            run,
            names[run],
            himo_at_k(scores),
            [k in falls(scores) for k in range(2, len(scores) + 1)],
        )
        for run, scores in example.scores
    ]
    told = "; ".join(f"{names[run]}: {_verdict(scores)}" for run, scores in example.scores)
    return order_strips(ident, f"Order of the scores of {example.image}", told, strips)


def himo_at_k(scores: Sequence[float]) -> str:
    """What HiMo@K says of one image: eq. (6) up to K = 3, eq. (5) from 4 on."""
    count = len(scores)
    if count > MORE_THAN:
        return f"HiMo@{count} = {fixed(pearson(scores), 3)}"
    return f"HiMo@{count}: {'not ' if falls(scores) else ''}in order"


def _verdict(scores: Sequence[float]) -> str:
    fallen = falls(scores)
    words = "rises with every segment"
    if fallen:
        words = f"does not rise at {', '.join(map(str, fallen))}"
    return words if len(scores) <= MORE_THAN else f"{words}, ρ = {number(pearson(scores), 3)}"
