"""Runs a session of steps: each with a time limit and its output in a file; none ends the next."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rows import ROOT

GRACE = 10  # seconds from SIGINT, on which pytest still writes its report, to SIGKILL


@dataclass(frozen=True)
class Step:
    """A command of the session."""

    name: str
    command: tuple[str, ...]
    seconds: int  # its limit
    environment: Mapping[str, str] = field(default_factory=dict)
    leaves: int = 0  # seconds of the session, for later steps


@dataclass
class Result:
    """How a step ended."""

    name: str
    status: str  # "ok", "status N", "time limit", "not here: PROGRAM" or "no time left"
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status.startswith(("status", "time limit"))


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen[bytes]
    started: float
    end: float
    stopped: bool = False


def run(
    session: Sequence[Sequence[Step]],  # the steps of a group run in parallel
    out: Path,
    minutes: float,
) -> list[Result]:
    """Runs the groups in order, prints a line for each step, and returns how they ended.

    A step's output is in out/NAME.txt. No step outlives the minutes. Ctrl-C or SIGTERM ends the
    running steps and leaves the others out.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    results: list[Result] = []
    with _terminable():
        for group in session:
            results += _run_group(group, out, end)
    lines = [_line(result) for result in results]
    (out / "steps.txt").write_text("\n".join(lines) + "\n")
    return results


def pack(out: Path, file: Path) -> None:
    """Writes everything in out to one tar file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path.resolve() != file.resolve():
                tar.add(path, arcname=path.name)


def parser(module: str, doc: str | None, minutes: float) -> argparse.ArgumentParser:
    """Returns the parser of a session's command."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=doc)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add = made.add_argument
    add("--out", type=Path, required=True, help="directory of rows and logs")
    add("--tar", type=Path, help="where to pack that directory; by default OUT.tar.gz")
    add("--minutes", type=float, default=minutes, help=f"no step outlives them; default {minutes}")
    add("--dry-run", action="store_true", help="small, on this CPU")
    add("--only", nargs="+", metavar="STEP", help="only these steps")
    return made


def main(
    session: Sequence[Sequence[Step]], options: argparse.Namespace, parser: argparse.ArgumentParser
) -> int:
    """Runs a session as its options say and packs it; returns the exit status."""
    if options.only:
        names = sorted({step.name for group in session for step in group})
        if unknown := sorted(set(options.only) - set(names)):
            parser.error(f"--only: expected names of {names}, got {unknown}")
        session = [[step for step in group if step.name in options.only] for group in session]
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    os.environ["PYTHONUNBUFFERED"] = "1"
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    tar = options.tar or options.out.with_name(f"{options.out.name}.tar.gz")
    try:
        results = run(session, options.out, options.minutes)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if options.out.exists():
            pack(options.out, tar)
            print(f"all of it: {tar}")
    return int(any(result.failed for result in results))


def _run_group(group: Sequence[Step], out: Path, end: float) -> list[Result]:
    running, results = [], []
    for step in group:
        left = end - time.monotonic() - GRACE - step.leaves
        if left < 1:
            results.append(Result(step.name, "no time left"))
        elif shutil.which(step.command[0]) is None:
            results.append(Result(step.name, f"not here: {step.command[0]}"))
        else:
            running.append(_start(step, out, min(step.seconds, left)))
    for result in results:
        print(_line(result), flush=True)
    try:
        for one in running:
            results.append(_wait(one))
            print(_line(results[-1]), flush=True)
    except BaseException:
        for one in running:
            _signal(one, signal.SIGKILL)
        raise
    return results


def _start(step: Step, out: Path, seconds: float) -> _Running:
    with (out / f"{step.name}.txt").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            start_new_session=True,  # its children end with it
        )
    now = time.monotonic()
    return _Running(step, process, now, now + seconds)


def _wait(one: _Running) -> Result:
    try:
        status = one.process.wait(max(0.0, one.end - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal(one, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(GRACE)
        _signal(one, signal.SIGKILL)  # also what it left behind
        one.process.wait()
        return Result(one.step.name, "time limit", time.monotonic() - one.started)
    _signal(one, signal.SIGKILL)
    told = "ok" if status == 0 else f"status {status}"
    return Result(one.step.name, told, time.monotonic() - one.started)


def _signal(one: _Running, number: int) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(one.process.pid, number)


@contextmanager
def _terminable() -> Iterator[None]:
    # SIGTERM, as from `timeout`, ends the session as Ctrl-C does.
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(result: Result) -> str:
    return f"{result.name:<16} {result.seconds:>5.0f} s  {result.status}"
