"""Rows of results: columns, properties of a run, and atomically replaced CSV files."""

import csv
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from himo_kernels.dispatch import backend_names

# The columns that identify a measurement. A new measurement replaces all of its rows.
CELL = ("backend", "B", "N", "D", "dtype", "config", "device", "threads")
COLUMNS = (
    "op",
    "backend",  # a backend of himo_kernels, or a baseline
    "auto",  # yes: the choice of backend="auto" here
    "mode",  # fwd, or fwd+bwd
    "B",
    "N",
    "D",
    "R",  # rank of the PCA, or inner dimension of the low-rank form
    "dtype",
    "config",
    "l2",  # cold or hot, on a GPU
    "timing",  # wall, events, graph; once: the single run of a memory measurement
    "time_ms_min",
    "time_ms_p20",
    "time_ms_p50",
    "time_ms_p80",
    "repeats",
    "peak_mib",  # beyond the inputs, including results
    "gbs",  # model bytes / p50
    "tflops",  # model FLOPs / p50
    "fraction",  # of the roofline given by the two ceilings
    "bound",  # which ceiling limits it: compute or memory
    "ceiling_tflops",  # a square matmul in this dtype, from the same run; empty: see reason
    "ceiling_gbs",  # a copy, likewise
    "error",  # largest relative error against float64
    "checked_n",  # number of leading samples checked
    "status",  # ok, inaccurate, refused, left out, out of memory, failed
    "reason",
    "device",
    "driver",
    "torch",
    "triton",
    "cuda",
    "threads",
    "load",  # one-minute load average when the cell began
    "commit",
    "date",
)
LIBRARY = (*backend_names(), "auto")  # names of backends; all other candidates are baselines
CRASHED = "(cell)"  # instead of a backend's name: the process died
ROOT = Path(__file__).parents[1]

Row = dict[str, str]


class BenchmarkError(ValueError):
    """A user error, as one printable line."""


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
    """Short hash of the checked-out commit, with -dirty if a source has changed; "" without git."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short", "HEAD")
        # Results and documentation do not affect measurements.
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
    """The rows of a file, or none if it does not exist. Raises BenchmarkError for other formats."""
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
    """Writes rows into a file, replacing rows of the same measurements and keeping others."""
    # Also drop the row of a cell that died before it could name a candidate.
    measured = {_cell(row | {"backend": name}) for row in new for name in (row["backend"], CRASHED)}
    others = [row for row in read(path) if _cell(row) not in measured]
    ordered = sorted([*others, *new], key=_order)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(ordered)
    write_whole(path, text.getvalue())


def replace_rows(
    path: Path, new: Sequence[Row], columns: Sequence[str], cell: Sequence[str]
) -> None:
    """Writes rows of other columns into a file, in place of those with the same cells."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    cells = {tuple(row[name] for name in cell) for row in new}
    others = [row for row in rows if tuple(row[name] for name in cell) not in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*others, *new])
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file atomically.

    himo.files does the same for checkpoints, but himo imports modules that a benchmark machine may
    not have.
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
    """A number in a row: four significant digits, "" for None."""
    return "" if value is None else f"{value:.4g}"
