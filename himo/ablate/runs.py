"""The runs of an ablation: each is `himo train`, then `himo eval`, in a process of its own."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himo.ablate.grid import Variant
from himo.checkpoint import digest
from himo.errors import HimoError
from himo.files import json_value, open_regular, write_text
from himo.flags import as_arguments
from himo.run_folder import CHECKPOINTS, model_name

_POLL_S = 0.2
_LAST_LINES = 3  # of a failed run's output, in the error


@dataclass(frozen=True)
class Job:
    """One run of a variant.

    Attributes:
        folder: of the run, as `himo train` makes it; `NAME.log` next to it has the output.
        train: arguments of `himo train`, without --device.
        evaluate: arguments of `himo eval`, without the model, the device and the output.
    """

    folder: Path
    train: Sequence[str]
    evaluate: Sequence[str]

    @property
    def result(self) -> Path:
        """What `himo eval` writes."""
        return self.folder / "eval.json"

    def model(self) -> Path | None:
        """The model of the last epoch, where the training has ended."""
        epochs = _read(self.folder / "config.json").get("epochs")
        if not isinstance(epochs, int):
            return None
        path = self.folder / CHECKPOINTS / model_name(epochs)
        return path if path.exists() else None

    def is_done(self) -> bool:
        """Whether the result belongs to the last model."""
        model, result = self.model(), _read(self.result)
        if model is None or not result:
            return False
        return bool(result.get("model", {}).get("sha256") == digest(model))


def job_of(
    out: Path, variant: Variant, seed: int, train: Mapping[str, Any], evaluate: Sequence[str]
) -> Job:
    """The run of a variant and a seed.

    Args:
        train: fields of TrainConfig, of every run.
        evaluate: flags of `himo eval`.
    """
    name = f"{variant.name}-{seed}"
    flags = {**train, **variant.flags, "seed": seed, "logs": os.fspath(out / "runs"), "name": name}
    return Job(out / "runs" / name, [*as_arguments(flags), "--resume", "latest"], list(evaluate))


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of an ablation, or checks that the one there has the same settings.

    Raises:
        HimoError: it holds runs of other settings, or cannot be written.
    """
    path = out / "ablation.json"
    before = _read(path)
    now = json.loads(json.dumps(settings))
    if not before and path.exists():
        raise HimoError(
            f"{path}: not the settings of an ablation; remove it, or give another --out"
        )
    differ = [key for key in now if before and before.get(key) != now[key]]
    if differ:
        raise HimoError(
            f"{out}: its runs had other {', '.join(differ)}; give them again, or another --out"
        )
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HimoError(f"{out}: cannot be written: {error.strerror}") from error
    write_text(path, json.dumps(now, indent=1) + "\n")


def run_all(jobs: Sequence[Job], devices: Sequence[str]) -> bool:
    """Runs the jobs that are not done, one at a time on each device; False if a signal stopped it.

    A stopped or killed run resumes from its last checkpoint the next time.

    Args:
        devices: names for --device; a name that is there twice takes two runs at a time.

    Raises:
        HimoError: a run fails. The others end first.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    left = [job for job in jobs if not job.is_done()]
    for job in left:
        waiting.put(job)
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} done before", flush=True)
    pool = _Pool(waiting, len(jobs), len(jobs) - len(left))
    threads = [threading.Thread(target=pool.work, args=(device,)) for device in devices]
    with pool.stopped_by_signals():
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a join without a limit takes no signal
                thread.join(_POLL_S)
    if pool.failures and not pool.stop.is_set():
        first, *others = pool.failures
        raise HimoError(f"{first}, and {len(others)} more failed" if others else first)
    return not pool.stop.is_set()


class _Pool:
    """Threads that each wait for one process after the other."""

    def __init__(self, waiting: "queue.SimpleQueue[Job]", total: int, done: int) -> None:
        self.waiting, self.total, self.done = waiting, total, done
        self.failures: list[str] = []
        self.stop = threading.Event()
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()

    def work(self, device: str) -> None:
        while not self.stop.is_set():
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._run(job, device)
            except (HimoError, OSError) as error:
                self.failures.append(f"{job.folder}: {error}")

    def _run(self, job: Job, device: str) -> None:
        log = job.folder.with_name(f"{job.folder.name}.log")
        with open(log, "ab") as output:
            if job.model() is None:
                self._process(["train", *job.train, "--device", device], output)
            model = job.model()
            if self.stop.is_set():
                return
            if model is not None and not job.is_done():
                given = ["--pretrained", os.fspath(model), "--out", os.fspath(job.result)]
                self._process(["eval", *given, *job.evaluate, "--device", device], output)
        if self.stop.is_set():
            return
        if not job.is_done():
            raise HimoError(f"failed: {' / '.join(_last_lines(log))} (all of it is in {log})")
        with self.lock:
            self.done += 1
            print(f"{self.done}/{self.total}: {job.folder.name} on {device}", flush=True)

    def _process(self, arguments: Sequence[str], output: Any) -> None:
        with self.lock:
            if self.stop.is_set():
                return
            # Of its own session: a Ctrl-C reaches it once, from here, and it saves before it ends.
            process = subprocess.Popen(
                [sys.executable, "-m", "himo", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.processes.add(process)
        if self.stop.is_set():  # a signal that came before the process was in the set
            process.send_signal(signal.SIGTERM)
        process.wait()
        with self.lock:
            self.processes.discard(process)

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Any:
        """SIGINT and SIGTERM end every process after its step, with a checkpoint."""

        def stop(number: int, frame: Any) -> None:
            self.stop.set()
            for process in list(self.processes):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _read(path: Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none, or a damaged one."""
    if not path.exists():
        return {}
    try:
        with open_regular(path) as file:
            value = json_value(file.read())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _last_lines(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line.strip()[:200] for line in lines if line.strip()][-_LAST_LINES:]
