"""The page of `himo eval --suite`: the paper's tables, with the user's results next to them."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from himo.evaluate.intervals import INTERVAL_RULE
from himo.evaluate.paper import MARKS
from himo.evaluate.tables import (
    MEASURES,
    Model,
    block_starts,
    by_set,
    groups,
    other_sizes,
    shown_cell,
)
from himo.report import versions
from himo.report.rendering import render
from himo.report.runs import plural

_PROTOCOL = ("split", "images", "captions", "captions_per_image", "texts_cut", "k_rule")


def suite_page(
    found: Sequence[dict[str, Any]],
    models: Sequence[Model],
    described: Sequence[Mapping[str, Any]],
) -> str:
    """The page.

    Args:
        found: the tables, of `himo.evaluate.tables.tables`.
        models: the checkpoints and their results.
        described: of each checkpoint its path and digest.
    """
    sets = list(models[0].scored)
    return render(
        "suite.html",
        noun="eval",
        title="Tables of HiMo-CLIP",
        names=[],  # no legend: nothing is drawn
        sets=plural(len(sets), "data set"),
        tables=[_table(table) for table in found],
        measures=list(MEASURES),
        by_set=[(model.name, by_set(model)) for model in models],
        notes=other_sizes(models[0]),
        protocol=_protocol(models),
        interval_rule=INTERVAL_RULE,
        marks=MARKS,
        checkpoints=[f"{of['name']}: {of['path']}, sha256 {of['sha256']}" for of in described],
        versions=versions(),
        now=datetime.now(),
    )


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the texts of its cells; `starts` marks the first row of a block."""
    decimals = [column["decimals"] for column in table["columns"]]
    rows = [
        {
            "method": row["method"],
            "backbone": row["backbone"],
            "measured": row["source"] == "measured",
            "starts": is_first,
            "cells": [shown_cell(*cell) for cell in zip(row["cells"], decimals, strict=True)],
        }
        for row, is_first in zip(table["rows"], block_starts(table["rows"]), strict=True)
    ]
    return {**table, "groups": groups(table["columns"]), "rows": rows}


def _protocol(models: Sequence[Model]) -> dict[str, Any]:
    """How each set was scored by the first model, as a table: `head` and `rows`."""
    rows = []
    for name, scored in models[0].scored.items():
        protocol = scored.sections["protocol"]
        cells = ["-" if protocol.get(key) is None else protocol[key] for key in _PROTOCOL]
        rows.append([name, *(f"{x:,}" if isinstance(x, int) else x for x in cells)])
    seen = [
        f"{model.name}: {model.config.context_length} tokens, images of "
        f"{model.config.image_resolution} pixels a side"
        for model in models
    ]
    head = ["", *(key.replace("_", " ") for key in _PROTOCOL)]
    return {"head": head, "rows": rows, "note": f"{'; '.join(seen)}."}
