"""Rows of results: their columns, the facts of a run, and CSV files that are whole or unchanged."""

import csv
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from himo_kernels.dispatch import backend_names

# What tells one measurement from another. A new one replaces all of its rows.
CELL = ("backend", "B", "N", "D", "dtype", "config", "device", "threads")
COLUMNS = (
    "op",
    "backend",  # of himo_kernels, or a baseline
    "auto",  # yes: what backend="auto" takes here
    "mode",  # fwd, or fwd+bwd
    "B",
    "N",
    "D",
    "R",  # kept rank, or inner dimension of the low-rank form
    "dtype",
    "config",
    "l2",  # cold or hot, on a GPU
    "timing",  # wall, events, graph; once: the single run of a memory measurement
    "time_ms_min",
    "time_ms_p20",
    "time_ms_p50",
    "time_ms_p80",
    "repeats",
    "peak_mib",  # beyond the inputs; results count
    "gbs",  # model bytes / p50
    "tflops",  # model FLOPs / p50
    "fraction",  # of the roofline that the two ceilings give
    "bound",  # which of them: compute or memory
    "ceiling_tflops",  # a square product in this dtype, measured in the same run; empty: see reason
    "ceiling_gbs",  # a copy, likewise
    "error",  # largest relative error against float64
    "checked_n",  # of so many leading samples
    "status",  # ok, inaccurate, refused, left out, out of memory, failed
    "reason",
    "device",
    "driver",
    "torch",
    "triton",
    "cuda",
    "threads",
    "load",  # of the machine, one minute's average, when the cell began
    "commit",
    "date",
)
LIBRARY = (*backend_names(), "auto")  # in the column backend; the others are baselines
CRASHED = "(cell)"  # in the place of a backend: the process ended, whichever it was measuring
ROOT = Path(__file__).parents[1]

Row = dict[str, str]


class BenchmarkError(ValueError):
    """A mistake of the user, as one line that is ready to print."""


def facts(device: str, threads: int) -> Row:
    """The columns that are the same in every row of a run."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "" if device == "cuda" else "",
        "threads": str(threads),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """Short hash of the checked-out commit, -dirty where a source differs from it; "" without."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        # Results and texts do not change what is measured.
        changed = git("status", "--porcelain", "--", "*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    except FileNotFoundError:
        return ""
    return f"{head}-dirty" if head and changed else head


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", text)[1].strip()
    except (OSError, TypeError):
        name = platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return re.search(r"(\d+\.\d+[.\d]*)", text)[1]
    except (OSError, TypeError):
        return ""


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return ""


def read(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file. Raises BenchmarkError for another format."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if set(reader.fieldnames or ()) != set(COLUMNS):
            raise BenchmarkError(
                f"{path}: expected the columns of benchmarks/rows.py, got {reader.fieldnames}"
            )
        return list(reader)


def merge(path: Path, new: list[Row]) -> None:
    """Puts rows into a file in place of earlier ones of the same measurements; others stay."""
    # With them goes the row of a cell that died before it could name a candidate.
    measured = {_cell(row | {"backend": name}) for row in new for name in (row["backend"], CRASHED)}
    kept = [row for row in read(path) if _cell(row) not in measured]
    ordered = sorted([*kept, *new], key=_order)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(ordered)
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Writes a file that at every moment is what it was before or all of the new one.

    himo.files does the same for checkpoints; importing himo needs more modules than a machine with
    a GPU to measure may have.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _cell(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in CELL)


def _order(row: Row) -> tuple:
    sizes = tuple(int(row[name]) for name in ("B", "N", "D"))
    return row["dtype"], row["config"], *sizes, row["mode"], row["device"]


def number(value: float | None) -> str:
    """Four significant digits, "" for None: what a row holds."""
    return "" if value is None else f"{value:.4g}"
