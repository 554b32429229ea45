"""The report: what its template shows, computed from the runs."""

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from himo.report import evaluation, monotonicity, training
from himo.report.growth import card, examples
from himo.report.rendering import render
from himo.report.runs import Run, differing, lookup, plural

_EXAMPLES = 8  # images of the growth curves
_MISSES = 6  # of all runs together, and at least 2 of each
_MAX_VALUE = 300  # characters of one setting
# Settings that name a run and do not say how it was trained.
_NAMES = {"name", "logs", "command", "versions", "resume"}


def report_page(runs: Sequence[Run], versions: str, now: datetime) -> str:
    """The report of one or several runs.

    Args:
        versions: of the software that writes the page, for its foot.
        now: the date on the page.
    """
    names = [run.label for run in runs]
    several = len(runs) > 1
    notes = [f"{run.label}: {note}" if several else note for run in runs for note in run.notes]
    of_each = max(2, _MISSES // len(runs))
    return render(
        "report.html",
        noun="report",
        title=" and ".join(names) if len(runs) < 3 else plural(len(runs), "run"),
        names=names,
        compared=_compared(runs),
        outcome=evaluation.outcome(runs),
        warnings=evaluation.comparability(runs) + notes,
        tiles=evaluation.tiles(runs),
        retrieval=evaluation.retrieval(runs),
        himo=monotonicity.himo(runs),
        cards=[
            card(f"growth-{i}", example, names)
            for i, example in enumerate(examples(runs, _EXAMPLES))
        ],
        chosen=_chosen(runs, of_each),
        misses=[(i, miss) for i, run in enumerate(runs) for miss in run.misses[:of_each]],
        training=_training(runs),
        settings=_settings(runs),
        checkpoints=_checkpoints(runs),
        versions=versions,
        now=now,
    )


def _chosen(runs: Sequence[Run], of_each: int) -> dict[str, str]:
    """How the images of the curves and of the misses were chosen, in sentences."""
    told = {}
    for key in ("curves", "misses"):
        said = {run.label: lookup(run.evaluation, "chosen", key) for run in runs}
        known = {label: how for label, how in said.items() if isinstance(how, str)}
        same = len(set(known.values())) == 1
        parts = known.values() if same else (f"{label}: {how}" for label, how in known.items())
        told[key] = " ".join(dict.fromkeys(parts)) or "How they were chosen is not recorded."
    if (count := max(len(run.curves) for run in runs)) > _EXAMPLES:
        told["curves"] += f" The first {_EXAMPLES} of {count} are shown."
    if max(len(run.misses) for run in runs) > of_each:
        told["misses"] += f" The first {of_each} of these are shown{' for each' * (len(runs) > 1)}."
    return told


def _training(runs: Sequence[Run]) -> dict[str, Any] | None:
    if not any(run.step for run in runs):
        return None
    return {
        "losses": training.losses(runs),
        "validation": training.validation(runs),
        "predictions": training.predictions(runs),
        "spectrum": training.spectrum_charts(runs),
        "optimisation": training.optimisation(runs),
    }


def _compared(runs: Sequence[Run]) -> dict[str, Any]:
    """What was trained, and the settings in which the runs differ, as (key, values)."""
    models = {m for run in runs if isinstance(m := run.setting("model"), str)}
    differ: list[tuple[str, list[str]]] = []
    settings = ""
    if len(runs) > 1 and all(run.config is not None for run in runs):
        keys = [key for key in differing(runs)[0] if key not in _NAMES]
        if not keys:
            settings = ", with the same settings"
        elif len(keys) > 3:
            settings = f", with {len(keys)} different settings (last section)"
        else:
            differ = [(key, [_value(run.setting(key)) for run in runs]) for key in keys]
    return {
        "what": "One run" if len(runs) == 1 else plural(len(runs), "run"),
        "model": models.pop() if len(models) == 1 else None,
        "extent": _extent(runs),
        "differ": differ,
        "settings": settings,
    }


def _extent(runs: Sequence[Run]) -> str:
    """How long all runs were trained; nothing where they differ in it."""
    trained = {(run.step[-1], run.column("samples")[-1]) if run.step else None for run in runs}
    longest = trained.pop()
    if trained or longest is None:
        return ""
    steps, samples = longest
    extent = f", {plural(steps, 'step')}"
    if samples is not None and abs(samples) < 1e15:  # NaN is not
        extent += f" and {plural(int(samples), 'sample')}"
    return extent + (" each" if len(runs) > 1 else "")


def _settings(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Rows of the settings that differ and of those that are the same; `count` of the latter."""
    if all(run.config is None for run in runs):
        return None
    different, same = differing(runs) if len(runs) > 1 else ([], differing(runs)[1])
    different.sort(key=lambda key: key in _NAMES)

    def rows(keys: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {
                "key": key,
                "cells": [_cell(run, key) for run in runs],
                "marked": key in different and key not in _NAMES,
            }
            for key in keys
        ]

    return {
        "different": rows(different),
        "same": rows(same),
        "count": plural(len(same), "setting is the same", "settings are the same"),
    }


def _cell(run: Run, key: str) -> str:
    return _value(run.config[key]) if run.config and key in run.config else "–"


def _value(value: Any) -> str:
    if isinstance(value, str):
        shown = value
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        shown = shlex.join(value)  # a command
    else:
        shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _MAX_VALUE else shown[:_MAX_VALUE] + " …"


def _checkpoints(runs: Sequence[Run]) -> list[str]:
    """Which checkpoint each run's results come from."""
    lines = []
    for run in runs:
        model = lookup(run.evaluation, "model")
        path, digest = lookup(model, "path"), lookup(model, "sha256")
        if isinstance(path, str):
            checksum = f", SHA-256 {digest[:16]}…" if isinstance(digest, str) else ""
            lines.append(f"{run.label}: evaluated {path}{checksum}")
    return lines
