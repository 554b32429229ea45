"""The report: what its template shows, computed from the runs."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from himo.report import evaluation, misses, monotonicity, training
from himo.report.growth import card, examples
from himo.report.rendering import render
from himo.report.runs import Run, differing, lookup, plural

_EXAMPLES = 8  # images of the growth curves
_MAX_VALUE = 300  # characters of one setting
# Settings that name a run, and do not say how it was trained.
_NAMES = {"name", "logs", "command", "versions", "resume"}


@dataclass(frozen=True)
class Compared:
    """What was trained, and the settings in which the runs differ, as (key, values)."""

    what: str
    model: str | None
    extent: str
    differ: Sequence[tuple[str, Sequence[str]]] = ()
    settings: str = ""


@dataclass(frozen=True)
class Setting:
    """One setting of all runs."""

    key: str
    cells: Sequence[str]
    marked: bool = False


@dataclass(frozen=True)
class Settings:
    """The settings that differ, then those that are the same; `count` says how many these are."""

    different: Sequence[Setting]
    same: Sequence[Setting]
    count: str


def report_page(runs: Sequence[Run], versions: str, now: datetime) -> str:
    """The report of one or several runs.

    Args:
        versions: of the software that writes the page, for its foot.
        now: the date it bears.
    """
    names = [run.label for run in runs]
    return render(
        "report.html",
        noun="report",
        title=" and ".join(names) if len(runs) < 3 else plural(len(runs), "run"),
        names=names,
        compared=_compared(runs),
        outcome=evaluation.outcome(runs),
        warnings=_warnings(runs),
        tiles=evaluation.tiles(runs),
        retrieval=evaluation.retrieval(runs),
        himo=monotonicity.himo(runs),
        cards=[
            card(f"growth-{i}", example, names)
            for i, example in enumerate(examples(runs, _EXAMPLES))
        ],
        pictures=max(len(run.curves) for run in runs),
        misses=misses.shown([run.misses for run in runs]),
        training=_training(runs),
        settings=_settings(runs),
        checkpoints=_checkpoints(runs),
        versions=versions,
        now=now,
    )


def _training(runs: Sequence[Run]) -> dict[str, Any] | None:
    if not any(run.step for run in runs):
        return None
    return {
        "losses": training.losses(runs),
        "validation": training.validation(runs),
        "spectrum": training.spectrum_charts(runs),
        "optimisation": training.optimisation(runs),
    }


def _compared(runs: Sequence[Run]) -> Compared:
    models = {m for run in runs if isinstance(m := run.setting("model"), str)}
    model = models.pop() if len(models) == 1 else None
    what = "One run" if len(runs) == 1 else plural(len(runs), "run")
    extent = _extent(runs)
    if len(runs) < 2 or any(run.config is None for run in runs):
        return Compared(what, model, extent)
    keys = [key for key in differing(runs)[0] if key not in _NAMES]
    if not keys:
        return Compared(what, model, extent, settings=", with the same settings")
    if len(keys) > 3:
        many = f", with {len(keys)} different settings (last section)"
        return Compared(what, model, extent, settings=many)
    differ = [(key, [_value(run.setting(key)) for run in runs]) for key in keys]
    return Compared(what, model, extent, differ)


def _extent(runs: Sequence[Run]) -> str:
    """How long all runs were trained; nothing where they differ in it."""
    trained = {(run.step[-1], run.column("samples")[-1]) if run.step else None for run in runs}
    longest = trained.pop()
    if trained or longest is None:
        return ""
    steps, samples = longest
    extent = f", {plural(steps, 'step')}"
    if samples is not None and samples == samples and abs(samples) < 1e15:
        extent += f" and {plural(int(samples), 'sample')}"
    return extent + (" each" if len(runs) > 1 else "")


def _warnings(runs: Sequence[Run]) -> list[str]:
    notes = evaluation.comparability(runs)
    return notes + [
        f"{run.label}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes
    ]


def _settings(runs: Sequence[Run]) -> Settings | None:
    """The settings of the runs, those that differ first and marked."""
    if all(run.config is None for run in runs):
        return None

    def rows(keys: Sequence[str], marked: bool = False) -> list[Setting]:
        return [Setting(key, [_cell(run, key) for run in runs], marked) for key in keys]

    different, same = differing(runs) if len(runs) > 1 else ([], differing(runs)[1])
    return Settings(
        rows([key for key in different if key not in _NAMES], marked=True)
        + rows([key for key in different if key in _NAMES]),
        rows(same),
        plural(len(same), "setting is the same", "settings are the same"),
    )


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
    """Which checkpoint the results of each run are of."""
    lines = []
    for run in runs:
        model = lookup(run.evaluation, "model")
        path, digest = lookup(model, "path"), lookup(model, "sha256")
        if isinstance(path, str):
            checksum = f", SHA-256 {digest[:16]}…" if isinstance(digest, str) else ""
            lines.append(f"{run.label}: evaluated {path}{checksum}")
    return lines
