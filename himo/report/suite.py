"""The page of `himo eval --suite`: the paper's tables with one's own results beside."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from himo.evaluate.intervals import INTERVAL_RULE
from himo.evaluate.tables import MEASURES, Model, by_set, other_sizes, shown_cell
from himo.report import versions
from himo.report.rendering import render
from himo.report.runs import plural

_PROTOCOL = ("split", "images", "captions", "captions_per_image", "texts_cut", "k_rule")
_MODEL = ("context_length", "image_resolution")


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
        names=[model.name for model in models],
        sets=plural(len(sets), "data set"),
        tables=[_table(table) for table in found],
        measures=list(MEASURES),
        by_set=[(model.name, by_set(model)) for model in models],
        notes=other_sizes(models[0]),
        protocol=_protocol(models[0]),
        interval_rule=INTERVAL_RULE,
        checkpoints=[f"{of['name']}: {of['path']}, sha256 {of['sha256']}" for of in described],
        versions=versions(),
        now=datetime.now(),
    )


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the texts of its cells; `starts` marks the first row of a block."""
    decimals = [column["decimals"] for column in table["columns"]]
    groups: list[list[Any]] = []
    for column in table["columns"]:
        if groups and groups[-1][0] == column["group"]:
            groups[-1][1] += 1
        else:
            groups.append([column["group"], 1])
    rows = [
        {
            "method": row["method"],
            "backbone": row["backbone"],
            "measured": row["source"] == "measured",
            "cells": [shown_cell(*cell) for cell in zip(row["cells"], decimals, strict=True)],
        }
        for row in table["rows"]
    ]
    return {**table, "groups": groups, "rows": rows}


def _protocol(model: Model) -> dict[str, Any]:
    """How each set was scored, as a table: `head` and `rows`."""
    rows = []
    for name, scored in model.scored.items():
        protocol = scored.sections["protocol"]
        cells = ["-" if protocol.get(key) is None else protocol[key] for key in _PROTOCOL]
        rows.append([name, *(f"{x:,}" if isinstance(x, int) else x for x in cells)])
    first = next(iter(model.scored.values())).sections["protocol"]
    note = ", ".join(f"{key.replace('_', ' ')} {first[key]}" for key in _MODEL)
    head = ["", *(key.replace("_", " ") for key in _PROTOCOL)]
    return {"head": head, "rows": rows, "note": f"{model.name}: {note}."}
