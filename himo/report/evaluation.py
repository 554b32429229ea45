"""The parts of a report that come from eval.json: main numbers, retrieval, what to know of them."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from himo.report.figures import Figure, bar_figure
from himo.report.runs import Run, as_number, lookup, plural
from himo_charts.scales import finite_only, fit, fixed, is_finite, number

RECALLS = ("R@1", "R@5", "R@10")
DIRECTIONS = (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))
# Where eval.json says how much of a data set took part.
_COVERAGES = (
    ("", "coverage"),
    (" on HiMo-Docci", "himo", "HiMo-Docci", "coverage"),
    (" on COLA", "cola", "coverage"),
)
_PROTOCOL = ("images", "captions", "positives", "sentence_rule_sha256", "k_rule")
_R_AT_1 = ("retrieval", "image_to_text", "R@1")
# Title, meaning, unit, decimals, and the keys of eval.json.
_TILES = (
    ("R@1, image to text", "the right caption first", "%", 1, _R_AT_1),
    ("R@1, text to image", "the right image first", "%", 1, ("retrieval", "text_to_image", "R@1")),
    ("HiMo@2", "rises over both halves", "%", 1, ("himo", "HiMo@2", "value")),
    ("HiMo@3", "rises over all thirds", "%", 1, ("himo", "HiMo@3", "value")),
    ("HiMo@K", "grows with length", "ρ", 3, ("himo", "HiMo@K", "value")),
    ("Throughput", "median, in training", "/s", 0, ()),
)


class Cell(NamedTuple):
    """One number, and whether it is the best of several runs."""

    shown: str
    best: bool = False
    unit: str = ""


class Tile(NamedTuple):
    """One of the main numbers, with a cell for each run."""

    title: str
    meaning: str
    cells: Sequence[Cell]


def tiles(runs: Sequence[Run]) -> list[Tile]:
    """The main numbers that at least one run has."""
    shown = []
    for title, meaning, unit, decimals, keys in _TILES:
        values = [run.result(*keys) if keys else _throughput(run) for run in runs]
        top = _best(values) if keys else None
        cells = [
            Cell(fixed(v, decimals), v is not None and v == top, unit if is_finite(v) else "")
            for v in values
        ]
        if finite_only(values):
            shown.append(Tile(title, meaning, cells))
    return shown


def _throughput(run: Run) -> float:
    return median(finite_only(run.column("samples_per_s")) or [math.nan])


def comparability(runs: Sequence[Run]) -> list[str]:
    """Why the runs' numbers may not be compared, and which samples they leave out: sentences."""
    evaluated = [run for run in runs if run.evaluation is not None]
    protocols = [lookup(run.evaluation, "protocol") for run in evaluated]
    digests = [lookup(protocol, "dataset_sha256") for protocol in protocols]
    same_data = "dataset" if None in digests else "dataset_sha256"
    different = [
        key
        for key in (same_data, *_PROTOCOL)
        if len({repr(lookup(protocol, key)) for protocol in protocols}) > 1
    ]
    if len({_texts(run) for run in evaluated}) > 1:
        different.append("texts")
    notes = []
    if different:
        notes.append(
            "The runs were evaluated differently "
            f"({', '.join(different)}): their results cannot be compared."
        )
    for run in evaluated:
        for what, *place in _COVERAGES:
            notes += _left_out(f"{run.label}{what}", lookup(run.evaluation, *place))
        if cut := run.result("protocol", "texts_cut"):
            notes.append(
                f"{run.label}: {number(cut)} texts were longer than the model's context and cut."
            )
        notes += _shared(run)
    return notes


def _shared(run: Run) -> list[str]:
    """Which queries have more than one right answer, and how many no score decides."""
    notes = []
    captions, texts = run.result("protocol", "captions"), _texts(run)
    if texts != captions:
        notes.append(
            f"{run.label}: {number(captions)} captions are {number(texts)} distinct texts, and "
            f"{number(run.result('protocol', 'shared_captions'))} are captions of several images: "
            "each of these is right."
        )
    ties = [(title, run.result("retrieval", "ties", key)) for key, title in DIRECTIONS]
    if any(count for _, count in ties):
        counts = ", ".join(f"{title.lower()} {number(count)}" for title, count in ties)
        notes.append(
            f"{run.label}: wrong answers that tie with the right one count as above it ({counts})."
        )
    return notes


def _texts(run: Run) -> float | None:
    # Older files do not count texts: there each caption was a text of its own.
    texts = run.result("protocol", "texts")
    return run.result("protocol", "captions") if texts is None else texts


def _left_out(label: str, coverage: Any) -> list[str]:
    """How many samples took no part in an evaluation, and why; nothing where all did."""
    used, total = as_number(lookup(coverage, "used")), as_number(lookup(coverage, "total"))
    if used is None or total is None or used == total:
        return []
    reasons, because = lookup(coverage, "left_out"), ""
    if isinstance(reasons, dict) and reasons:
        why = ", ".join(f"{name}: {number(as_number(count))}" for name, count in reasons.items())
        because = f" (left out: {why})"
    return [f"{label}: evaluated on {number(used)} of {number(total)} samples{because}."]


def retrieval(runs: Sequence[Run]) -> dict[str, Any] | None:
    """`figures`: recalls both ways; `rows`: a row of cells for each run. None without results."""
    if all(lookup(run.evaluation, "retrieval") is None for run in runs):
        return None
    columns = [(key, name) for key, _ in DIRECTIONS for name in RECALLS]
    values = [[run.result("retrieval", *column) for column in columns] for run in runs]
    best = [_best(column) for column in zip(*values, strict=True)]
    rows = []
    for run, of_run in zip(runs, values, strict=True):
        chance = run.result("retrieval", "chance_R@1")
        times = of_run[0] / chance if of_run[0] is not None and chance else None
        recalls = (
            Cell(fixed(v, 2), v is not None and v == top)
            for v, top in zip(of_run, best, strict=True)
        )
        more = [fixed(chance, 2), "–" if times is None else f"{number(times, 3)}×"]
        more += [number(run.result("protocol", name)) for name in ("images", "captions")]
        rows.append([*recalls, *map(Cell, more)])
    # Both directions on the same axis.
    y = fit((value for of_run in values for value in of_run), zero=True, margin=0.08)
    figures = []
    for way, (key, title) in enumerate(DIRECTIONS):
        bars = [of_run[3 * way : 3 * way + 3] for of_run in values]
        if y is None or not finite_only(value for of_run in bars for value in of_run):
            figures.append(Figure(title, missing=f"No run has results for {key}."))
            continue
        guesses, caption = _guessing(runs, key)
        figures.append(
            bar_figure(
                Figure(title, caption=caption),
                key.replace("_", "-"),
                f"Recall, {title.lower()}",
                runs,
                RECALLS,
                bars,
                y,
                lambda value: f"{fixed(value, 2)} %",
                y_label="% of queries",
                chance=guesses,
            )
        )
    return {"figures": figures, "rows": rows}


def _guessing(runs: Sequence[Run], key: str) -> tuple[list[float | None], str]:
    """R@1, R@5 and R@10 of guessing where they are known for all runs, and a caption."""
    chances = finite_only(run.result("retrieval", "chance_R@1") for run in runs)
    if len(set(chances)) != 1:
        return [None] * 3, ""
    # k guesses find the one right answer k times as often; one of several, less.
    alone = all(_one_answer(run, key) for run in runs)
    guesses = [min(100.0, chances[0] * k) if alone or k == 1 else None for k in (1, 5, 10)]
    return guesses, f"Dashed: guessing; its R@1 is {fixed(chances[0], 2)} %."


def _one_answer(run: Run, key: str) -> bool:
    """Whether each query of a direction has one right answer."""
    pairs = run.result("protocol", "pairs")
    if pairs is None:  # an older file: each caption was a text of one image
        pairs = run.result("protocol", "captions")
    return pairs == (run.result("protocol", "images") if key == "image_to_text" else _texts(run))


def outcome(runs: Sequence[Run]) -> dict[str, Any] | None:
    """R@1 of each run for one sentence; None where the runs cannot be compared in one.

    `found` holds (name, percent); `among` and `chance` are texts, empty where unknown.
    """
    evaluated = [run for run in runs if run.result(*_R_AT_1) is not None]
    if not evaluated or len(evaluated) > 4 or comparability(evaluated):
        return None
    texts, chance = _texts(evaluated[0]), evaluated[0].result("retrieval", "chance_R@1")
    counted = texts is not None and math.isfinite(texts)
    return {
        "found": [(run.label, fixed(run.result(*_R_AT_1), 1)) for run in evaluated],
        "among": f", among {plural(int(texts or 0), 'caption')}" if counted else "",
        "chance": fixed(chance, 2) if is_finite(chance) else "",
    }


def _best(values: Sequence[float | None]) -> float | None:
    """The largest of at least two values; None where there is nothing to compare."""
    finite = finite_only(values)
    return max(finite) if len(finite) > 1 else None
