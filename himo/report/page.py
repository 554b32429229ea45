"""The pages: what goes where, in words a reader of the page can follow."""

import json
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from himo.report import evaluation, misses, monotonicity, training
from himo.report.charts import colour_class, swatch, text
from himo.report.growth import CHOICE, card, examples
from himo.report.runs import Run, differing, lookup, plural
from himo.report.style import sheet

_EXAMPLES = 8  # images of the growth curves
_MAX_VALUE = 300  # characters of one setting
# Settings that name a run, and do not say how it was trained.
_NAMES = {"name", "logs", "command", "versions", "resume"}


def document(title: str, body: str, runs: int, noun: str) -> str:
    """A whole page around `body`. It can fetch nothing, by its own policy, and runs no script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta name="generator" content="himo {noun}"><link rel="icon" href="data:,">'
        f"<title>{text(title)}</title><style>{sheet(runs)}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def report_page(runs: Sequence[Run], versions: str, now: datetime) -> str:
    """The report of one or several runs.

    Args:
        versions: of the software that writes the page, for its foot.
        now: the date it bears.
    """
    title = " and ".join(run.label for run in runs) if len(runs) < 3 else plural(len(runs), "run")
    sections = [
        _section("", "", evaluation.tiles(runs)),
        _section(
            "Retrieval",
            "How often the right caption is among the first 1, 5 or 10 for an image, and the right "
            "image for a caption. Ties count against the model.",
            evaluation.retrieval(runs),
        ),
        _section(
            "Does similarity grow with detail?",
            "A true caption that says more should fit its image better. HiMo@2 and HiMo@3 cut a "
            "caption into halves or thirds and count those whose similarity rises with every part; "
            "HiMo@K is the correlation of similarity with the number of parts read.",
            monotonicity.himo(runs),
        ),
        _growth(runs),
        _section(
            "What it mistakes",
            "Captions that another image fits better than their own.",
            misses.section([run.misses for run in runs], [run.label for run in runs]),
        ),
        *(_training(runs) if any(run.step for run in runs) else []),
        _section("Settings", "", _settings(runs)),
    ]
    body = (
        f"<header><p class=over>HiMo-CLIP report</p><h1>{_heading(runs)}</h1>"
        f"{_lead(runs)}{_warnings(runs)}</header>{legend([run.label for run in runs])}"
        f"<main>{''.join(sections)}</main>{footer(_checkpoints(runs), versions, now)}"
    )
    return document(title, body, len(runs), "report")


def _training(runs: Sequence[Run]) -> list[str]:
    """The sections on training; all of them, so that what was not logged is seen."""

    def charts(content: str) -> str:
        return content and f'<div class="charts">{content}</div>'

    return [
        _section(
            "Loss",
            "Bold: moving average; faint: as logged. The number beside a title is the last value "
            "logged.",
            charts(training.losses(runs)),
        ),
        _section(
            "Retrieval while training",
            "On held-out pairs, after an epoch.",
            charts(training.validation(runs)),
        ),
        _section(
            "What the projection keeps",
            "Each batch of text features is projected on its R leading principal components, the "
            "fewest that hold a share τ of the variance. That is what the component loss sees.",
            charts(training.spectrum_charts(runs)),
        ),
        _section(
            "Optimisation",
            "",
            charts(training.optimisation(runs)),
        ),
    ]


def _section(title: str, about: str, content: str) -> str:
    if not content:
        return ""
    heading = f"<h2>{text(title)}</h2>" if title else ""
    words = f"<p class=about>{text(about)}</p>" if about else ""
    return f"<section>{heading}{words}{content}</section>"


def _heading(runs: Sequence[Run]) -> str:
    if len(runs) > 3:
        return plural(len(runs), "run")
    return ' <span class="and">and</span> '.join(text(run.label) for run in runs)


def _lead(runs: Sequence[Run]) -> str:
    sentences = [_compared(runs), evaluation.lead(runs)]
    return f'<p class="lead">{" ".join(s for s in sentences if s)}</p>' if any(sentences) else ""


def _compared(runs: Sequence[Run]) -> str:
    """What was trained, and in what the runs differ."""
    models = {text(m) for run in runs if isinstance(m := run.setting("model"), str)}
    model = f" of model <b>{models.pop()}</b>" if len(models) == 1 else ""
    trained = []
    for run in runs:
        if run.step:
            trained.append((run.step[-1], (run.column("samples")[-1])))
    extent = ""
    if trained and len(set(trained)) == 1 and len(trained) == len(runs):
        steps, samples = trained[0]
        extent = f", {plural(steps, 'step')}"
        if samples is not None and samples == samples and abs(samples) < 1e15:
            extent += f" and {plural(int(samples), 'sample')}"
        extent += " each" if len(runs) > 1 else ""
    what = ("One run" if len(runs) == 1 else plural(len(runs), "run")) + model + extent
    configured = [run for run in runs if run.config is not None]
    if len(configured) < 2 or len(configured) < len(runs):
        return f"{what}."
    keys = [key for key in differing(runs)[0] if key not in _NAMES]
    if not keys:
        return f"{what}, with the same settings."
    if len(keys) > 3:
        return f"{what}, with {len(keys)} different settings (last section)."
    named = "; ".join(
        f"<b>{text(key)}</b> ({', '.join(text(_value(run.setting(key))) for run in runs)})"
        for key in keys
    )
    return f"{what}. They differ in {named}."


def _warnings(runs: Sequence[Run]) -> str:
    notes = evaluation.comparability(runs)
    notes += [
        f"{run.label}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes
    ]
    if not notes:
        return ""
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return f'<div class="warnings"><h2>To know about these numbers</h2><ul>{items}</ul></div>'


def legend(names: Sequence[str]) -> str:
    """The names of the runs in their colours; an emptied box hides the run in all charts."""
    if len(names) < 2:
        return ""
    entries = "".join(
        f'<label class="{colour_class(index)}"><input type="checkbox" id="show-{index}" checked>'
        f"<span>{text(name)}</span></label>"
        for index, name in enumerate(names)
    )
    return f'<nav class="legend" aria-label="Runs shown"><div>{entries}</div></nav>'


def _growth(runs: Sequence[Run]) -> str:
    shown = examples(runs, _EXAMPLES)
    if not shown:
        return ""
    names = [run.label for run in runs]
    cards = "".join(card(f"growth-{i}", example, names) for i, example in enumerate(shown))
    total = max(len(run.curves) for run in runs)
    about = (
        "Similarity of an image and the first k segments of its caption. A red triangle marks a "
        "score that does not rise."
    )
    if total > len(shown):
        about += f" {len(shown)} of {total} images."
    return _section("Single images", about, f'{CHOICE}<div class="pairs">{cards}</div>')


def _settings(runs: Sequence[Run]) -> str:
    """The settings of the runs, those that differ first and marked."""
    if all(run.config is None for run in runs):
        return ""
    different, same = differing(runs)
    head = "".join(
        f'<th scope="col">{swatch(i) if len(runs) > 1 else ""}{text(run.label)}</th>'
        for i, run in enumerate(runs)
    )

    def rows(keys: Sequence[str], css: str) -> str:
        return "".join(
            f'<tr{css}><th scope="row"><code>{text(key)}</code></th>'
            + "".join(
                f"<td>{text(_value(run.config[key])) if run.config and key in run.config else '–'}"
                "</td>"
                for run in runs
            )
            + "</tr>"
            for key in keys
        )

    def table(body: str) -> str:
        return (
            '<div class="scroll" tabindex="0"><table class="settings"><thead><tr>'
            f'<th scope="col">setting</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    if len(runs) == 1:
        return table(rows(same, ""))
    parts = []
    if different:
        marked = [key for key in different if key not in _NAMES]
        names = [key for key in different if key in _NAMES]
        parts.append(table(rows(marked, " class=differs") + rows(names, "")))
    if same:
        count = plural(len(same), "setting is the same", "settings are the same")
        parts.append(f"<details><summary>{count}</summary>{table(rows(same, ''))}</details>")
    return "".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, str):
        shown = value
    elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        shown = shlex.join(value)  # a command
    else:
        shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= _MAX_VALUE else shown[:_MAX_VALUE] + " …"


def footer(lines: Sequence[str], versions: str, now: datetime) -> str:
    """The foot of a page: `lines`, and by what it was written and when."""
    rows = "".join(f"<p>{text(line)}</p>" for line in lines)
    written = now.strftime("%Y-%m-%d %H:%M")
    return f"<footer>{rows}<p>Written {written} by {text(versions)}.</p></footer>"


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
