"""Times every operator and its baselines, and writes a row per candidate and mode.

python -m benchmarks.run --device cpu --all --out benchmarks/results/cpu
python -m benchmarks.run --device cpu --op dual_info_nce --n 1024 4096 --out /tmp/rows
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import cases as grid
from benchmarks import compare
from benchmarks import rows as table
from benchmarks.cases import Case
from benchmarks.rows import LIBRARY, BenchmarkError, Row

# Seconds without an answer after which a worker is killed.
CASE_TIMEOUT = {"cpu": 600, "cuda": 120}


class Worker:
    """A process that measures. It is restarted after it died."""

    def __init__(self, device: str, threads: int, log: TextIO, timeout_s: float | None) -> None:
        self.device, self.log, self.timeout_s = device, log, timeout_s
        bound = {
            "OMP_PROC_BIND": "true",  # a thread that migrates finds a cold cache
            "OMP_PLACES": "cores",
            # A process pool would compete with the timed code for two cores.
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            **(bound if device == "cpu" else {}),  # on a GPU it would bind the compiler's processes
            "PYTHONWARNINGS": "ignore",
        }
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answers to one request. Raises WorkerDied if the process ends before the last one."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading the answers will raise
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        while True:
            try:
                answer = self.answers.get(timeout=self.timeout_s)
            except queue.Empty:
                self.stop()
                raise WorkerDied(f"no answer for {self.timeout_s} s") from None
            if answer is None:
                status = self.process.wait()
                self.stop()
                signal = "out of memory (killed)" if status == -9 else f"status {status}"
                raise WorkerDied(f"the process ended with {signal}; see log.txt")
            if answer.get("done"):
                return
            yield answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", self.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=table.ROOT,
            env=self.environment,
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(json.loads(line))
        answers.put(None)


class WorkerDied(Exception):
    """A worker ended or hung during a case."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user error."""
    options = _parser().parse_args(arguments)
    try:
        cases = _cases(options)
        cores = os.cpu_count() or 1
        if options.baseline_seconds is None:
            options.baseline_seconds = math.inf if options.all or options.once else 8.0
        options.threads = options.threads or (min(2, cores) if options.device == "cpu" else cores)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError("--device cuda: this torch sees no CUDA device")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            log = (options.out / "log.txt").open("w")
        except OSError as error:
            raise BenchmarkError(f"--out {options.out}: {error.strerror}") from error
        with log:
            return run(cases, options, log)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; finished cells are written", file=sys.stderr)
        return 130


def run(cases: list[Case], options: argparse.Namespace, log: TextIO) -> int:
    """Measures the cases; returns 1 if a library backend is inaccurate or fails the gate."""
    rows = measure(cases, options, log)
    if bad := inaccurate(rows):
        warn(f"{len(bad)} rows of the library fail their accuracy check; see {options.out}")
    slower = compare.gate(rows) if options.gate else 0
    return 1 if bad or slower else 0


def inaccurate(rows: list[Row]) -> list[Row]:
    """The rows of the library that fail their accuracy check."""
    return [row for row in rows if row["status"] == "inaccurate" and row["backend"] in LIBRARY]


def measure(cases: list[Case], options: argparse.Namespace, log: TextIO) -> list[Row]:
    """Measures the cases within the budget; returns their rows, also written to options.out."""
    end = time.monotonic() + 60 * options.budget_minutes
    for op in {case.op for case in cases}:
        table.read(options.out / f"{op}.csv")  # fails on a file of another format before measuring
    if options.device == "cpu" and os.getloadavg()[0] > 0.5:
        warn(f"load average {os.getloadavg()[0]:.1f}: something else runs here; the rows say so")
    timeout_s = None if options.once else CASE_TIMEOUT[options.device]
    worker = Worker(options.device, options.threads, log, timeout_s)
    facts = table.facts(options.device, options.threads)
    measured: list[Row] = []
    left_out = []
    try:
        (ceilings,) = worker.ask({"dtypes": sorted({case.dtype for case in cases})})
        print(f"ceilings: {json.dumps(ceilings)}", file=log, flush=True)
        with progress(len(cases)) as bar:
            for case in cases:
                name = f"{case.op} {case.size} {case.dtype} {case.config}"
                if time.monotonic() > end:
                    left_out.append(name)
                    bar.update()
                    continue
                bar.set_description_str(name)
                if options.device == "cpu":
                    worker.stop()  # a fresh process for each cell
                found = [facts | row for row in _measure(worker, case, options, ceilings)]
                table.merge(options.out / f"{case.op}.csv", found)
                measured += found
                for row in found:
                    print(_line(row), file=log, flush=True)
                bar.update()
    except WorkerDied as error:
        raise BenchmarkError(f"the ceilings cannot be measured: {error}") from error
    finally:
        worker.stop()
    for name in left_out:
        print(f"left out, the budget is used up: {name}", file=log)
    if left_out:
        warn(f"{len(left_out)} of {len(cases)} cells left out: the budget is used up")
    return measured


def warn(text: str) -> None:
    print(f"benchmarks: {text}", file=sys.stderr)


def _measure(
    worker: Worker, case: Case, options: argparse.Namespace, ceilings: dict[str, float | str]
) -> list[Row]:
    request = {
        "case": dataclasses.asdict(case),
        "seconds": options.seconds,
        "ceilings": ceilings,
        "compile": not options.no_compile,
        "memory": not options.no_memory,
        "baseline_seconds": options.baseline_seconds,
        "only": options.backend or case.only,
    }
    found: list[Row] = []
    try:
        found.extend(worker.ask(request))
    except WorkerDied as error:
        cell = {name: str(getattr(case, name)) for name in ("op", *table.CELL[1:6])}
        died = {"backend": table.CRASHED, "mode": "", "status": "failed", "reason": str(error)}
        found.append(cell | died)
    return found


def _cases(options: argparse.Namespace) -> list[Case]:
    given = {
        "N": options.n,
        "D": options.d,
        "B": options.batch,
        "dtype": options.dtype,
        "spectrum": options.spectrum,
        "tau": options.tau,
        "preset": options.preset,
        "form": options.form,
        "share": options.rank_share,
        "modes": [(mode,) for mode in options.mode] if options.mode else None,
    }
    given = {name: values for name, values in given.items() if values}
    if options.once and (options.all or options.device != "cpu"):
        raise BenchmarkError("--once: expected --op and --n on a CPU, not --all or another device")
    if options.all:
        if given or options.op:
            raise BenchmarkError("--all: expected no --op and no other choice of cells beside it")
        return grid.full_run(options.device)
    if not options.op or not options.n:
        raise BenchmarkError("expected --all, or --op and --n")
    modes = given.pop("modes", [grid.MODES])
    cases = [case for op in options.op for case in grid.product(op, **given)]
    # One cell for both modes: they share inputs, checks and compilation.
    both = tuple(mode for choice in modes for mode in choice)
    changes = {"modes": both, "memory": True, "timed": not options.once}
    cases = [dataclasses.replace(case, **changes) for case in cases]
    for case in cases:
        if case.B > 1 and case.op not in ("covariance", "gram", "pca_reconstruct", "normalize"):
            raise BenchmarkError(f"--batch {case.B}: {case.op} is measured on one problem only")
    return cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--out", type=Path, required=True, help="directory of the csv files and log.txt")
    add("--all", action="store_true", help="the cells of a full run, the most important first")
    add("--op", nargs="+", choices=tuple(grid.OPTIONS), metavar="OP", help=", ".join(grid.OPTIONS))
    add("--n", nargs="+", type=positive, help="samples")
    add("--d", nargs="+", type=positive, help="features; 768 by default")
    add("--batch", nargs="+", type=positive, help="independent problems; 1 by default")
    add("--dtype", nargs="+", choices=grid.DTYPES, help="float32 by default")
    add("--mode", nargs="+", choices=grid.MODES, help="both by default")
    add("--spectrum", nargs="+", choices=grid.SPECTRA, help="of the texts")
    add("--tau", nargs="+", type=_share, help="variance threshold of pca_reconstruct")
    add("--preset", nargs="+", choices=grid.PRESETS, help="of the losses")
    add("--form", nargs="+", choices=grid.FORMS, help="of info_nce_pairs")
    add("--rank-share", nargs="+", type=_share, help="R / D of the low-rank loss")
    add("--backend", nargs="+", default=[], help="only these candidates, by name in the rows")
    add("--threads", type=positive, help="CPU threads; default 2, and all cores with a GPU")
    add("--seconds", type=float, default=1.0, help="of timing per candidate and mode; default 1")
    add(
        "--baseline-seconds",
        type=float,
        help="on a CPU, for all baselines of a cell with compilation; slower ones are left out; "
        "default 8, and no limit with --all or --once",
    )
    add("--once", action="store_true", help="on a CPU, one run each: for calls that take minutes")
    add("--budget-minutes", type=float, default=60.0, help="no cell starts later; default 60")
    add("--no-compile", action="store_true", help="do not measure torch.compile")
    add("--no-memory", action="store_true", help="do not measure peak memory on a CPU")
    add(
        "--gate",
        action="store_true",
        help="print the speed of the automatic choice over the best plain PyTorch formula of each "
        f"cell; status 1 if one is below {compare.GATE}",
    )
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


def _line(row: Row) -> str:
    time_ms = f"{row['time_ms_p50']} ms" if row.get("time_ms_p50") else row.get("reason", "")
    place = " ".join(row[name] for name in ("op", "backend", "mode", "B", "N", "D", "dtype"))
    return f"{place} {row['config']}: {row['status']} {time_ms}"


class _Lines:
    # Replaces tqdm if it is not installed: one line per cell.
    def __init__(self, total: int) -> None:
        self.total, self.at = total, 0

    def set_description_str(self, text: str) -> None:
        print(f"[{self.at + 1}/{self.total}] {text}", file=sys.stderr, flush=True)

    def update(self) -> None:
        self.at += 1


@contextlib.contextmanager
def progress(total: int) -> Iterator[Any]:
    """A progress bar, or lines if tqdm is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _Lines(total)
        return
    with tqdm(total=total, unit="cell", dynamic_ncols=True) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
