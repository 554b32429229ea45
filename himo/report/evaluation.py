"""The parts of a report that come from eval.json: headline, retrieval, HiMo@K."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from himo.report.figures import Figure, Table
from himo.report.runs import Run, as_number, lookup, plural
from himo_charts.scales import finite_only, fit, fixed, is_finite, number
from himo_charts.svg import bar_chart

RECALLS = ("R@1", "R@5", "R@10")
DIRECTIONS = (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))
# Where eval.json says how much of a data set took part.
_COVERAGES = (
    ("", "coverage"),
    (" on HiMo-Docci", "himo", "HiMo-Docci", "coverage"),
    (" on COLA", "cola", "coverage"),
)
_PROTOCOL = ("images", "captions", "positives", "sentence_rule_sha256", "k_rule")


@dataclass(frozen=True)
class Cell:
    """One number, and whether it is the best of several runs'."""

    shown: str
    best: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Tile:
    """A main number of all runs: a cell for each."""

    title: str
    meaning: str
    values: Sequence[Cell]


@dataclass(frozen=True)
class Retrieval:
    """Recalls both ways as charts, and the rows of their table: a row for each run."""

    figures: Sequence[Figure]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Outcome:
    """R@1 of each run as (name, percent), for a sentence."""

    found: Sequence[tuple[str, str]]
    among: str
    chance: str


def tiles(runs: Sequence[Run]) -> list[Tile]:
    """The main numbers, those that a run has."""
    wanted: list[tuple[str, str, str, int, Callable[[Run], float | None], bool]] = [
        (
            "R@1, image to text", "the right caption first", "%", 1,
            lambda run: run.result("retrieval", "image_to_text", "R@1"), True,
        ),
        (
            "R@1, text to image", "the right image first", "%", 1,
            lambda run: run.result("retrieval", "text_to_image", "R@1"), True,
        ),
        (
            "HiMo@2", "rises over both halves", "%", 1,
            lambda run: run.result("himo", "HiMo@2", "value"), True,
        ),
        (
            "HiMo@3", "rises over all thirds", "%", 1,
            lambda run: run.result("himo", "HiMo@3", "value"), True,
        ),
        (
            "HiMo@K", "grows with length", "ρ", 3,
            lambda run: run.result("himo", "HiMo@K", "value"), True,
        ),
        (
            "Throughput", "median, in training", "/s", 0,
            lambda run: median(finite_only(run.column("samples_per_s")) or [math.nan]), False,
        ),
    ]  # fmt: skip
    shown = []
    for title, meaning, unit, decimals, get, rank in wanted:
        values = [get(run) for run in runs]
        if not finite_only(values):
            continue
        top = _best(values) if rank else None
        cells = [
            Cell(fixed(v, decimals), v is not None and v == top, unit if is_finite(v) else "")
            for v in values
        ]
        shown.append(Tile(title, meaning, cells))
    return shown


def comparability(runs: Sequence[Run]) -> list[str]:
    """Why the numbers of the runs may not be compared, and what they leave out: sentences."""
    evaluated = [run for run in runs if run.evaluation is not None]
    notes = []
    same_data = "dataset_sha256" if all(_dataset_sha256(run) for run in evaluated) else "dataset"
    different = [
        key
        for key in (same_data, *_PROTOCOL)
        if len({repr(lookup(run.evaluation, "protocol", key)) for run in evaluated}) > 1
    ]
    if len({_texts(run) for run in evaluated}) > 1:
        different.append("texts")
    if different:
        notes.append(
            "The runs were evaluated differently "
            f"({', '.join(different)}): their results cannot be compared."
        )
    for run in evaluated:
        for what, *place in _COVERAGES:
            notes += _left_out(f"{run.label}{what}", lookup(run.evaluation, *place))
        cut = run.result("protocol", "texts_cut")
        if cut:
            notes.append(
                f"{run.label}: {number(cut)} texts were longer than the model's context and cut."
            )
        notes += _shared(run)
    return notes


def _shared(run: Run) -> list[str]:
    """What in the data has more than one right answer, and which answers no score decides."""
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
    # Before captions of the same text were one text, each was one of its own.
    texts = run.result("protocol", "texts")
    return run.result("protocol", "captions") if texts is None else texts


def _left_out(label: str, coverage: Any) -> list[str]:
    """How many samples took no part in an evaluation, and why; nothing where all did."""
    used, total = as_number(lookup(coverage, "used")), as_number(lookup(coverage, "total"))
    if used is None or total is None or used == total:
        return []
    reasons = lookup(coverage, "left_out")
    why = (
        ", ".join(f"{reason}: {number(as_number(count))}" for reason, count in reasons.items())
        if isinstance(reasons, dict)
        else ""
    )
    because = f" (left out: {why})" if why else ""
    return [f"{label}: evaluated on {number(used)} of {number(total)} samples{because}."]


def retrieval(runs: Sequence[Run]) -> Retrieval | None:
    """Recalls both ways; None where no run has any."""
    if all(lookup(run.evaluation, "retrieval") is None for run in runs):
        return None
    columns = [(key, name) for key, _ in DIRECTIONS for name in RECALLS]
    values = [[run.result("retrieval", key, name) for key, name in columns] for run in runs]
    best = [_best(column) for column in zip(*values, strict=True)]
    rows = []
    for run, of_run in zip(runs, values, strict=True):
        chance = run.result("retrieval", "chance_R@1")
        times = of_run[0] / chance if of_run[0] is not None and chance else None
        cells = [
            Cell(fixed(v, 2), v is not None and v == top)
            for v, top in zip(of_run, best, strict=True)
        ]
        more = [fixed(chance, 2), "–" if times is None else f"{number(times, 3)}×"]
        more += [number(run.result("protocol", name)) for name in ("images", "captions")]
        rows.append([*cells, *map(Cell, more)])
    return Retrieval([_recall_chart(runs, key, title) for key, title in DIRECTIONS], rows)


def _recall_chart(runs: Sequence[Run], key: str, title: str) -> Figure:
    bars = [[run.result("retrieval", key, name) for name in RECALLS] for run in runs]
    # Both directions on the same axis.
    every = (run.result("retrieval", k, n) for run in runs for k, _ in DIRECTIONS for n in RECALLS)
    y = fit(every, zero=True, margin=0.08)
    if y is None or not finite_only(value for values in bars for value in values):
        return Figure(title, "%", missing=f"No run has results for {key}.")
    chances = finite_only(run.result("retrieval", "chance_R@1") for run in runs)
    chance = chances[0] if chances and len(set(chances)) == 1 else None
    # k guesses find the one right answer k times as often; one of several, less.
    alone = all(_one_answer(run, key) for run in runs)
    guesses = [
        min(100.0, chance * k) if chance is not None and (alone or k == 1) else None
        for k in (1, 5, 10)
    ]
    chart = bar_chart(
        key.replace("_", "-"),
        f"Recall, {title.lower()}",
        "; ".join(
            f"{run.label}: "
            + ", ".join(f"{n} {fixed(v, 2)} %" for n, v in zip(RECALLS, values, strict=True))
            for run, values in zip(runs, bars, strict=True)
        ),
        RECALLS,
        bars,
        y,
        chance=guesses,
    )
    table = Table(
        ["", *RECALLS],
        [
            [run.label, *(fixed(value, 2) for value in values)]
            for run, values in zip(runs, bars, strict=True)
        ],
    )
    caption = f"Dashed: guessing; its R@1 is {fixed(chance, 2)} %." if chance is not None else ""
    return Figure(title, "% of queries", chart, table, caption=caption)


def _one_answer(run: Run, key: str) -> bool:
    """Whether each query of a direction has one right answer."""
    pairs = run.result("protocol", "pairs")
    if pairs is None:  # an older file: each caption was a text of one image
        pairs = run.result("protocol", "captions")
    return pairs == (run.result("protocol", "images") if key == "image_to_text" else _texts(run))


def outcome(runs: Sequence[Run]) -> Outcome | None:
    """What came out, for people; None where the runs cannot be compared in one sentence."""
    evaluated = [run for run in runs if run.result("retrieval", "image_to_text", "R@1") is not None]
    if not evaluated or len(evaluated) > 4 or comparability(evaluated):
        return None
    texts = _texts(evaluated[0])
    chance = evaluated[0].result("retrieval", "chance_R@1")
    return Outcome(
        [
            (run.label, fixed(run.result("retrieval", "image_to_text", "R@1"), 1))
            for run in evaluated
        ],
        f", among {plural(int(texts), 'caption')}"
        if texts is not None and math.isfinite(texts)
        else "",
        fixed(chance, 2) if is_finite(chance) else "",
    )


def _best(values: Sequence[float | None]) -> float | None:
    """The largest of at least two values; None where there is nothing to compare."""
    finite = finite_only(values)
    return max(finite) if len(finite) > 1 else None


def _dataset_sha256(run: Run) -> bool:
    return lookup(run.evaluation, "protocol", "dataset_sha256") is not None
