"""The page of an ablation: the paper's tables, measured here, next to the paper's values."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from himo.ablate.grid import PAPER_COLUMNS, Table, Variant
from himo.printing import csv_cell
from himo.report import evaluation, versions
from himo.report import figures as charts
from himo.report.rendering import render
from himo.report.runs import Run, as_number, lookup, plural, read_run
from himo_charts.scales import fit, fixed

_DOCCI = ("himo", "HiMo-Docci", "value")
# Name, decimals, and the keys of eval.json.
_MEASURES = (
    ("R@1, image to text", 1, ("retrieval", "image_to_text", "R@1")),
    ("R@1, text to image", 1, ("retrieval", "text_to_image", "R@1")),
    ("HiMo@2", 1, ("himo", "HiMo@2", "value")),
    ("HiMo@3", 1, ("himo", "HiMo@3", "value")),
    ("HiMo@K", 3, ("himo", "HiMo@K", "value")),
    ("HiMo@K, HiMo-Docci", 3, _DOCCI),
)
_CHARTED = (("HiMo@2", "% of captions", 1), ("HiMo@K", "correlation", 2))
_MOST_K = 12  # columns of the table by K
_NOT_ALONE = 2  # seeds from which on there is a deviation


@dataclass(frozen=True)
class Results:
    """The runs of each variant by its name, one for each seed."""

    runs: Mapping[str, Sequence[Run]]

    def values(self, variant: Variant, *keys: str) -> list[float]:
        found = (run.result(*keys) for run in self.runs[variant.name])
        return [value for value in found if value is not None and math.isfinite(value)]

    def mean(self, variant: Variant, *keys: str) -> float | None:
        values = self.values(variant, *keys)
        return mean(values) if values else None

    def measures(self) -> list[tuple[str, int, tuple[str, ...]]]:
        """Those of retrieval, and those that at least one run has."""
        every = [run for runs in self.runs.values() for run in runs]
        found = [m for m in _MEASURES[2:] if any(run.result(*m[2]) is not None for run in every)]
        return [*_MEASURES[:2], *found]

    def cell(self, variant: Variant, decimals: int, *keys: str) -> str:
        """The mean, and the standard deviation over seeds."""
        values = self.values(variant, *keys)
        if not values:
            return "–"
        shown = fixed(mean(values), decimals)
        if len(values) < _NOT_ALONE:
            return shown
        return f"{shown} ± {fixed(stdev(values), decimals)}"


def read_results(folders: Mapping[str, Sequence[Path]]) -> Results:
    """The results in the folders of each variant's runs."""
    return Results({name: [read_run(path) for path in paths] for name, paths in folders.items()})


def ablation_page(
    tables: Sequence[Table], results: Results, about: Sequence[str], now: datetime
) -> str:
    """The page.

    Args:
        about: sentences on what was trained and evaluated.
        now: the date on the page.
    """
    runs = [run for of_variant in results.runs.values() for run in of_variant]
    seeds = max(len(of_variant) for of_variant in results.runs.values())
    return render(
        "ablate.html",
        noun="ablate",
        title=f"Ablation: {plural(len(runs), 'run')}",
        names=("here", "paper"),
        about=about,
        runs=plural(len(runs), "run"),
        seeds=plural(seeds, "seed"),
        alone=seeds < _NOT_ALONE,
        warnings=evaluation.comparability(runs)[:1] if len(runs) > 1 else [],
        sections=[_section(table, results) for table in tables],
        by_k=_by_k(tables, results),
        checkpoints=[],
        versions=versions(),
        now=now,
    )


def numbers_csv(tables: Sequence[Table], results: Results) -> str:
    """Every run's measures, a line for each row of a table and seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "run", *(name for name, _, _ in _MEASURES)])
    for table in tables:
        for label, variant, _ in table.rows:
            for run in results.runs[variant.name]:
                values = (run.result(*keys) for _, _, keys in _MEASURES)
                shown = ["" if value is None else repr(value) for value in values]
                writer.writerow([table.number, csv_cell(label), csv_cell(run.label), *shown])
    return buffer.getvalue()


def _section(table: Table, results: Results) -> dict[str, Any]:
    measures = results.measures()
    rows = [
        [
            label,
            " / ".join(
                results.cell(variant, decimals, *keys) for _, decimals, keys in measures[:2]
            ),
            *(results.cell(variant, decimals, *keys) for _, decimals, keys in measures[2:]),
            *(printed or ("–",) * len(PAPER_COLUMNS)),
        ]
        for label, variant, printed in table.rows
    ]
    return {
        "title": f"Table {table.number}: {table.title}",
        "about": " ".join([table.about, *_found(table, results)]),
        "here": ["R@1, I2T / T2I", *(name for name, _, _ in measures[2:])],
        "paper": PAPER_COLUMNS,
        "rows": rows,
        "figures": [figure for name, _, _ in _CHARTED if (figure := _figure(table, results, name))],
    }


def _keys(name: str, results: Results) -> tuple[str, ...]:
    """Where a measure of the paper is in eval.json: its HiMo@K is that on HiMo-Docci."""
    if name == "HiMo@K" and any(name == "HiMo@K, HiMo-Docci" for name, _, _ in results.measures()):
        return _DOCCI
    return next(keys for known, _, keys in _MEASURES if known == name)


def _printed(values: tuple[str, ...] | None, name: str) -> float | None:
    return None if values is None else float(values[PAPER_COLUMNS.index(name)])


def _figure(table: Table, results: Results, name: str) -> charts.Figure | None:
    unit, decimals = next((unit, decimals) for known, unit, decimals in _CHARTED if known == name)
    keys = _keys(name, results)
    here = [results.mean(variant, *keys) for _, variant, _ in table.rows]
    paper = [_printed(values, name) for _, _, values in table.rows]
    y = fit((value for value in (*here, *paper) if value is not None), zero=True, margin=0.08)
    if y is None:
        return None
    return charts.bar_figure(
        charts.Figure(f"{name}, table {table.number}"),
        f"table-{table.number}-{name[-1].lower()}",
        f"{name} of table {table.number}, here and in the paper",
        [Run(Path(), "here"), Run(Path(), "paper")],
        [label for label, _, _ in table.rows],
        [here, paper],
        y,
        lambda value: fixed(value, decimals + 1),
        y_label=unit,
        chance=[None] * len(here),
        decimals=decimals,
    )


def _found(table: Table, results: Results) -> list[str]:
    """Which row is best, here and in the paper: a sentence for each measure of both."""
    sentences = []
    for name, _, _ in _CHARTED:
        keys = _keys(name, results)
        here = {label: results.mean(variant, *keys) for label, variant, _ in table.rows}
        paper = {label: _printed(values, name) for label, _, values in table.rows}
        best_here, best_paper = _best(here), _best(paper)
        if best_here and best_paper:
            agree = "as in the paper" if best_here == best_paper else f"in the paper {best_paper}"
            sentences.append(f"{name} is highest with {best_here}, {agree}.")
    return sentences


def _best(values: Mapping[str, float | None]) -> str:
    """The labels of the largest value."""
    known = [value for value in values.values() if value is not None]
    labels = [label for label, value in values.items() if value is not None and value == max(known)]
    return " and ".join(labels)


def _by_k(tables: Sequence[Table], results: Results) -> charts.Table | None:
    """HiMo@2 and HiMo@3, and the mean correlation of the captions of each K from 4 on."""
    labels: dict[str, str] = {}
    for table in tables:
        for label, variant, _ in table.rows:
            labels[variant.name] = label if variant.name != "full" else "τ = 0.9, λ = 1"
    by_variant = {name: _correlations(results.runs[name]) for name in labels}
    every = sorted({k for found in by_variant.values() for k in found if k > 3})
    if not every:
        return None
    shown = every[:_MOST_K]
    runs = next(iter(results.runs.values()))
    counts = {k: len(_correlations(runs[:1]).get(k, [])) for k in shown}
    rows = []
    for name, label in labels.items():
        variant, found = Variant(name), by_variant[name]
        strict = [results.cell(variant, 1, "himo", f"HiMo@{k}", "value") for k in (2, 3)]
        means = [fixed(mean(found[k]), 3) if found.get(k) else "–" for k in shown]
        rows.append([label, *strict, *means])
    head = ["", "K = 2, %", "K = 3, %", *(f"K = {k}, ρ" for k in shown)]
    captions = ", ".join(f"{counts[k]:,} of K = {k}" for k in shown)
    left_out = f" Larger K, up to {every[-1]}, are left out." if len(every) > len(shown) else ""
    return charts.Table(head, rows, f"Captions: {captions}.{left_out}")


def _correlations(runs: Sequence[Run]) -> dict[int, list[float]]:
    """The correlations of the captions of each K, of all runs."""
    found: dict[int, list[float]] = {}
    for run in runs:
        lengths, rho = (lookup(run.evaluation, "histogram", key) for key in ("K", "rho"))
        for length, value in zip(lengths or [], rho or [], strict=False):
            number = as_number(value)
            if isinstance(length, int) and number is not None:
                found.setdefault(length, []).append(number)
    return found
