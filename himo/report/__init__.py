"""`himo report`: one HTML page about one or several training runs, which needs nothing else."""

import argparse
import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from himo.files import keep_inputs, output_path, write_text
from himo.printing import csv_cell
from himo.report import export
from himo.report.page import report_page
from himo.report.runs import COLUMNS, FILES, Run, distinct_names, read_runs
from himo_kernels import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo report`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directories of runs (LOGS/NAME of himo train)"
    )
    text = "the page; its numbers go next to it as .csv and .json (default: %(default)s)"
    parser.add_argument("--out", default="report.html", metavar="FILE", help=text)
    export.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`himo report`."""
    export.check(args)
    page = write_report(args.runs, args.out)
    print(f"report: {page.resolve()}")
    export.export(args, page, distinct_names(args.runs))
    return 0


def write_report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the page about `runs`, and its numbers as csv and json next to it.

    Args:
        runs: run directories, in the order they are shown.
        out: the page, ending in .html. `out` with .csv gets every line of the metrics of all
            runs, with .json their settings and evaluation results.

    Returns:
        The path of the page.

    Raises:
        HimoError: a path is not a run, or a file cannot be written or is one of a run's.
    """
    page = output_path(out, ".html")
    written = [page.with_suffix(suffix) for suffix in (".csv", ".json", ".html")]
    keep_inputs(f"--out {page}", written, (Path(run_) / name for run_ in runs for name in FILES))
    read = read_runs(runs)
    contents = (
        _csv_lines(read),
        json.dumps(_finite({"runs": [_numbers(run_) for run_ in read]}), indent=1) + "\n",
        report_page(read, versions(), datetime.now()),
    )
    for file, content in zip(written, contents, strict=True):
        write_text(file, content)
    return page


def versions() -> str:
    """The names and versions of the software that writes a page."""
    return f"himo {__version__}, torch {torch.__version__}"


def _csv_lines(runs: Sequence[Run]) -> str:
    """metrics.jsonl of all runs in one table, a line for each logged step."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "step", *COLUMNS])
    for run_ in runs:
        name = csv_cell(run_.label)
        columns = (run_.column(column) for column in COLUMNS)
        for step, *values in zip(run_.step, *columns, strict=True):
            writer.writerow([name, step, *("" if v is None else repr(v) for v in values)])
    return buffer.getvalue()


def _numbers(run_: Run) -> dict[str, Any]:
    """Settings, results and notes of a run as JSON."""
    last: dict[str, float | None] = {"step": run_.step[-1]} if run_.step else {}
    last |= {c: run_.columns[c][-1] for c in COLUMNS if c in run_.columns}
    results = run_.evaluation
    if results is not None:
        # Without the rank of every query and without pictures: these stay in eval.json.
        results = {k: v for k, v in results.items() if k not in ("ranks", "misses")}
        results["curves"] = [
            {"image": c.image, "segments": list(c.segments), "scores": list(c.scores)}
            for c in run_.curves
        ]
    return {
        "run": run_.label,
        "path": str(run_.path),
        "config": run_.config,
        "last_metrics": last or None,
        "evaluation": results,
        "notes": run_.notes,
    }


def _finite(value: Any) -> Any:
    """The same value with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
