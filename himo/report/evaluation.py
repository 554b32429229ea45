"""The parts of a report that come from eval.json: headline, retrieval, HiMo@K."""

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from himo.report.charts import (
    Table,
    bar_chart,
    empty_figure,
    figure,
    swatch,
    text,
)
from himo.report.runs import Run, as_number, lookup, plural
from himo.report.scales import finite_only, fit, fixed, is_finite, number

RECALLS = ("R@1", "R@5", "R@10")
DIRECTIONS = (("image_to_text", "Image to text"), ("text_to_image", "Text to image"))
# Where eval.json says how much of a data set took part.
_COVERAGES = (
    ("", "coverage"),
    (" on HiMo-Docci", "himo", "HiMo-Docci", "coverage"),
    (" on COLA", "cola", "coverage"),
)
_PROTOCOL = ("images", "captions", "positives", "sentence_rule_sha256", "k_rule")


def tiles(runs: Sequence[Run]) -> str:
    """The main numbers, large: one tile a number, one line a run."""
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
    parts = []
    for title, meaning, unit, decimals, get, rank in wanted:
        values = [get(run) for run in runs]
        if not finite_only(values):
            continue
        top = _best(values)
        rows = "".join(
            f"<div><dt>{swatch(index)}"
            f'<span class="sr">{text(run.label)}</span></dt>'
            f"<dd{' class=best' if rank and value is not None and value == top else ''}>"
            f"{fixed(value, decimals)}<small>{unit if is_finite(value) else ''}</small></dd></div>"
            for index, (run, value) in enumerate(zip(runs, values, strict=True))
        )
        parts.append(f'<div class="tile"><h3>{title}</h3><p>{meaning}</p><dl>{rows}</dl></div>')
    return f'<div class="tiles">{"".join(parts)}</div>' if parts else ""


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


def retrieval(runs: Sequence[Run]) -> str:
    """Bars for both directions and the table."""
    evaluated = [run for run in runs if lookup(run.evaluation, "retrieval") is not None]
    if not evaluated:
        return "<p class=note>No run has retrieval results.</p>"
    charts = "".join(_recall_chart(runs, key, title) for key, title in DIRECTIONS)
    head = '<th scope="col"></th>' + "".join(
        f'<th scope="col">{name}</th>' for _ in DIRECTIONS for name in RECALLS
    )
    columns = [(key, name) for key, _ in DIRECTIONS for name in RECALLS]
    values = [[run.result("retrieval", key, name) for key, name in columns] for run in runs]
    best = [_best(column) for column in zip(*values, strict=True)]
    body = ""
    for index, run in enumerate(runs):
        cells = "".join(
            f"<td{' class=best' if v is not None and v == top else ''}>{fixed(v, 2)}</td>"
            for v, top in zip(values[index], best, strict=True)
        )
        chance = run.result("retrieval", "chance_R@1")
        first = values[index][0]
        times = first / chance if first is not None and chance else None
        body += (
            f'<tr><th scope="row">{swatch(index)}{text(run.label)}</th>{cells}'
            f"<td>{fixed(chance, 2)}</td><td>{'–' if times is None else _times(times)}</td>"
            f"<td>{_count(run, 'images')}</td><td>{_count(run, 'captions')}</td></tr>"
        )
    table = (
        '<div class="scroll" tabindex="0"><table class="numbers main"><thead><tr><td></td>'
        '<th class="group" scope="colgroup" colspan="3">image to text, %</th>'
        '<th class="group" scope="colgroup" colspan="3">text to image, %</th><td colspan="4"></td>'
        f'</tr><tr>{head}<th scope="col">chance R@1</th><th scope="col">R@1 / chance</th>'
        '<th scope="col">images</th><th scope="col">captions</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return f'<div class="charts two">{charts}</div>{table}'


def _recall_chart(runs: Sequence[Run], key: str, title: str) -> str:
    bars = [[run.result("retrieval", key, name) for name in RECALLS] for run in runs]
    # Both directions on the same axis.
    every = (run.result("retrieval", k, n) for run in runs for k, _ in DIRECTIONS for n in RECALLS)
    y = fit(every, zero=True, margin=0.08)
    if y is None or not finite_only(value for values in bars for value in values):
        return empty_figure(title, "%", f"No run has results for {key}.")
    chances = finite_only(run.result("retrieval", "chance_R@1") for run in runs)
    chance = chances[0] if chances and len(set(chances)) == 1 else None
    # k guesses find the one right answer k times as often; one of several, less.
    alone = all(_one_answer(run, key) for run in runs)
    guesses = [
        min(100.0, chance * k) if chance is not None and (alone or k == 1) else None
        for k in (1, 5, 10)
    ]
    svg = bar_chart(
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
    return figure(title, "% of queries", svg, table, caption=caption)


def _one_answer(run: Run, key: str) -> bool:
    """Whether each query of a direction has one right answer."""
    pairs = run.result("protocol", "pairs")
    if pairs is None:  # an older file: each caption was a text of one image
        pairs = run.result("protocol", "captions")
    return pairs == (run.result("protocol", "images") if key == "image_to_text" else _texts(run))


def lead(runs: Sequence[Run]) -> str:
    """One sentence for people: what was measured on which data, and what came out."""
    evaluated = [run for run in runs if run.result("retrieval", "image_to_text", "R@1") is not None]
    if not evaluated or len(evaluated) > 4 or comparability(evaluated):
        return ""
    texts = _texts(evaluated[0])
    among = ""
    if texts is not None and math.isfinite(texts):
        among = f", among {plural(int(texts), 'caption')}"
    found = _joined(
        [
            f"<b>{text(run.label)}</b> ranks its caption first in "
            f"{fixed(run.result('retrieval', 'image_to_text', 'R@1'), 1)} % of cases"
            for run in evaluated
        ]
    )
    chance = evaluated[0].result("retrieval", "chance_R@1")
    guess = f" Guessing would in {fixed(chance, 2)} %." if is_finite(chance) else ""
    return f"Shown an image, {found}{among}.{guess}"


def _best(values: Sequence[float | None]) -> float | None:
    """The largest of at least two values; None where there is nothing to compare."""
    finite = finite_only(values)
    return max(finite) if len(finite) > 1 else None


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _dataset_sha256(run: Run) -> bool:
    return lookup(run.evaluation, "protocol", "dataset_sha256") is not None


def _count(run: Run, name: str) -> str:
    return number(run.result("protocol", name))


def _times(value: float) -> str:
    return f"{number(value, 3)}×"
