"""Tables 1 to 3 of the paper, with the results of the user's checkpoints next to the paper's."""

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from himo.clip_config import CLIPConfig
from himo.evaluate.intervals import Estimate, mean_estimate
from himo.evaluate.paper import BACKBONES, MARKS, OURS, TABLES, Column, PaperTable
from himo.evaluate.suite import Scored
from himo.printing import csv_cell

_FIELDS = ("value", "low", "high", "paper", "difference", "difference_low", "difference_high")
_NAME = 20  # characters of a row's name on a terminal
# Width and patch of the vision tower, at 224 pixels.
_BACKBONES = {(768, 16, 224): BACKBONES[0], (1024, 14, 224): BACKBONES[1]}


class Model(NamedTuple):
    """A checkpoint and its results by data set."""

    name: str
    config: CLIPConfig
    scored: Mapping[str, Scored]


def backbone(config: CLIPConfig) -> str:
    """The paper's name of a vision tower, or its sizes where the paper has none."""
    sizes = (config.vision_width, config.vision_patch_size, config.image_resolution)
    return _BACKBONES.get(sizes, f"width {sizes[0]}, patch {sizes[1]}, {sizes[2]} px")


def tables(models: Sequence[Model]) -> list[dict[str, Any]]:
    """The tables for which a model has a result, as JSON.

    Each has "table", its number; "title"; "columns", each {"group", "name", "sets", "measure",
    "decimals"}; and "rows", each {"method", "backbone", "source": "paper" or "measured", "cells"}.
    A cell of the paper is {"value": ...}. A measured one has the bounds of its 95 % interval too,
    and where the paper has a value of HiMo-CLIP with the same backbone, that value, the difference
    from it and its bounds. The paper's value counts as exact: it states no interval. A cell
    without a value is None.
    """
    found = []
    for table in TABLES:
        measured = [_measured(table, model) for model in models]
        if any(cell for row in measured for cell in row["cells"]):
            columns = [column._asdict() for column in table.columns]
            rows = [*_printed(table), *measured]
            head = {"table": table.number, "title": table.title}
            found.append(head | {"columns": columns, "rows": rows})
    return found


def _printed(table: PaperTable) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "backbone": of,
            "source": "paper",
            "cells": [None if value is None else {"value": value} for value in values],
        }
        for method, of, values in table.rows
    ]


def _measured(table: PaperTable, model: Model) -> dict[str, Any]:
    of = backbone(model.config)
    ours = next((row[2] for row in table.rows if row[:2] == (OURS, of)), None)
    papers = ours or (None,) * len(table.columns)
    cells = [
        _cell(_estimate(column, model.scored), value)
        for column, value in zip(table.columns, papers, strict=True)
    ]
    return {"method": model.name, "backbone": of, "source": "measured", "cells": cells}


def _estimate(column: Column, scored: Mapping[str, Scored]) -> Estimate | None:
    """The result of a column: its measure, averaged over its sets; None where one is missing."""
    of_sets = [
        scored[name].measures.get(column.measure) if name in scored else None
        for name in column.sets
    ]
    there = [of for of in of_sets if of is not None]
    return mean_estimate(there) if len(there) == len(of_sets) else None


def _cell(of: Estimate | None, paper: float | None) -> dict[str, float] | None:
    if of is None:
        return None
    low, high = of.interval()
    cell = {"value": of.value, "low": low, "high": high}
    if paper is not None:
        cell |= {"paper": paper, "difference": of.value - paper}
        cell |= {"difference_low": low - paper, "difference_high": high - paper}
    return cell


def csv_text(found: Sequence[dict[str, Any]], models: Sequence[Model]) -> str:
    """The tables as csv, a line for each cell with a value; then every measure of every set."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("table", "method", "backbone", "source", "sets", "measure", *_FIELDS)
    writer.writerow(head)
    for table in found:
        for row in table["rows"]:
            names = [csv_cell(row[key]) for key in ("method", "backbone", "source")]
            for column, cell in zip(table["columns"], row["cells"], strict=True):
                if cell is not None:
                    where = ["+".join(column["sets"]), column["measure"]]
                    values = ["" if key not in cell else repr(cell[key]) for key in _FIELDS]
                    writer.writerow([table["table"], *names, *where, *values])
    for model in models:
        for name, scored in model.scored.items():
            for measure, of in scored.measures.items():
                row = ["", csv_cell(model.name), backbone(model.config), "measured"]
                values = [repr(of.value), *map(repr, of.interval()), "", "", "", ""]
                writer.writerow([*row, csv_cell(name), measure, *values])
    return buffer.getvalue()


def latex(found: Sequence[dict[str, Any]]) -> str:
    r"""The tables in LaTeX, for \usepackage{booktabs}; under each value its interval."""
    return "\n".join(_latex(table) for table in found)


def _latex(table: dict[str, Any]) -> str:
    columns, rows = table["columns"], table["rows"]
    over = groups(columns)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(table['title'])}. The paper's rows are as printed; "
        r"intervals are 95\,\%, differences from HiMo-CLIP with the same backbone. "
        rf"{_escaped(MARKS)}}}",
        r"\begin{tabular}{ll" + "c" * len(columns) + "}",
        r"\toprule",
        " & & "
        + " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{_escaped(name)}}}" for name, n in over)
        + r" \\",
        "Method & Backbone & " + " & ".join(_escaped(c["name"]) for c in columns) + r" \\",
    ]
    for row, is_first in zip(rows, block_starts(rows), strict=True):
        if is_first:
            lines.append(r"\midrule")
        shown = [shown_cell(c, of["decimals"]) for c, of in zip(row["cells"], columns, strict=True)]
        names = [_escaped(row["method"]), _escaped(row["backbone"])]
        lines.append(" & ".join([*names, *(cell.value for cell in shown)]) + r" \\")
        for what, texts in (
            ("interval", [cell.interval for cell in shown]),
            ("difference", [cell.difference for cell in shown]),
        ):
            if any(texts):
                small = [rf"\scriptsize {text}" if text else "" for text in texts]
                lines.append(" & ".join([rf"\quad\scriptsize {what}", "", *small]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL["†"] = r"\dag{}"
_SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def block_starts(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Whether each row begins a block: a backbone of the paper, or the measured rows."""
    blocks = [
        row["backbone"][: len(BACKBONES[0])] if row["source"] == "paper" else "" for row in rows
    ]
    return [before != block for before, block in zip([None, *blocks], blocks, strict=False)]


def groups(columns: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """The names of neighbouring columns of one group, and how many they are."""
    return [(name, len(list(of))) for name, of in groupby(columns, key=lambda x: x["group"])]


class Shown(NamedTuple):
    """The texts of a cell."""

    value: str
    interval: str = ""
    difference: str = ""


def shown_cell(cell: dict[str, float] | None, decimals: int) -> Shown:
    """A cell as text: "-" where there is no value."""
    if cell is None:
        return Shown("-")
    value = f"{cell['value']:.{decimals}f}"
    if "low" not in cell:
        return Shown(value)
    interval = f"[{cell['low']:.{decimals}f}, {cell['high']:.{decimals}f}]"
    if "paper" not in cell:
        return Shown(value, interval)
    # Its interval has the same width.
    return Shown(value, interval, f"{cell['difference']:+.{decimals}f}")


# Measures of any set, with their decimals.
MEASURES = {"R@1 I2T": 1, "R@1 T2I": 1, "HiMo@2": 1, "HiMo@3": 1, "HiMo@K": 2, "COLA": 1}


def by_set(model: Model) -> list[tuple[str, list[Shown]]]:
    """A row of MEASURES for each set of a model."""
    rows = []
    for name, scored in model.scored.items():
        cells = [
            shown_cell(_cell(scored.measures.get(measure), None), decimals)
            for measure, decimals in MEASURES.items()
        ]
        rows.append((name, cells))
    return rows


def other_sizes(model: Model) -> list[str]:
    """The named sets that are not here in full, a sentence each."""
    notes = []
    for name, scored in model.scored.items():
        protocol = scored.sections["protocol"]
        official = protocol.get("official_size")
        here = protocol.get("images")
        if official and here is not None and here != official["images"]:
            notes.append(f"{name}: {here:,} images, the whole set has {official['images']:,}.")
    return notes


def terminal(found: Sequence[dict[str, Any]], models: Sequence[Model]) -> str:
    """Every set, then the tables with HiMo-CLIP's rows alone; at most 80 columns wide."""
    lines = []
    for model in models:
        lines += ["", _line(model.name, list(MEASURES), 10)]
        lines += [_line(f"  {name}", [c.value for c in cells], 10) for name, cells in by_set(model)]
    lines += other_sizes(models[0])
    for table in found:
        columns = table["columns"]
        width = min(10, (80 - _NAME) // len(columns))
        lines += ["", f"Table {table['table']}: {table['title']}"]
        for key in ("group", "name"):
            lines.append(_line("", [column[key] for column in columns], width))
        for row in table["rows"]:
            if row["source"] == "paper" and row["method"] != OURS:
                continue
            name = f"paper {row['backbone']}" if row["source"] == "paper" else row["method"]
            cells = [
                shown_cell(cell, column["decimals"])
                for cell, column in zip(row["cells"], columns, strict=True)
            ]
            lines.append(_line(name, [cell.value for cell in cells], width))
            if any(cell.difference for cell in cells):
                lines.append(_line("  difference", [cell.difference for cell in cells], width))
    return "\n".join(lines[1:])


def _line(name: str, cells: Sequence[str], width: int) -> str:
    short = name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"
    return (f"{short:<{_NAME}}" + "".join(f"{cell[:width]:>{width}}" for cell in cells)).rstrip()
