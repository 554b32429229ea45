"""The folder of a run: its owner, what killed runs left in it, and an account of its starts."""

import dataclasses
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import himo_kernels
from himo.config import TrainConfig
from himo.errors import MAX_QUOTED, HimoError, note, shortened
from himo.files import json_value, open_regular, remove_abandoned, write_text
from himo.resume import Change, unchecked
from himo.training_log import TrainingLog
from himo.training_state import State, find_state, saved_states, set_aside

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
_LOCK = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LARGEST = 64 << 20  # bytes of a config.json: a start takes 1,000
_WAIT_S, _RESTART_WAIT_S, _POLL_S = 2.0, 60.0, 0.05  # for an owner that is being killed


@contextmanager
def owned(directory: Path, wait_s: float | None = None) -> Iterator[None]:
    """Makes this process the one that writes the run in a folder, until the body ends.

    The folder is made if there is none, and removed again if the body leaves it empty. The kernel
    gives the ownership back when the process ends, however it ends. What killed saves left is
    removed. Where the file system has no locks, that is said, and nothing is removed.

    Args:
        directory: the folder.
        wait_s: seconds to wait for another owner to end; by default 2, and 60 where torchrun has
            restarted the run, whose processes before may still be ending.

    Raises:
        HimoError: another process owns it, which is named; or it cannot be written.
    """
    if wait_s is None:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        wait_s = _RESTART_WAIT_S if restarted else _WAIT_S
    made: list[Path] = []
    descriptor = None
    try:
        try:
            made = [path for path in (directory, *directory.parents) if not path.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(directory, wait_s)
            _clean(directory)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise HimoError(f"{directory}: cannot be written: {error.strerror}") from error
            note(
                f"{directory}: its file system has no locks ({error.strerror}): a second run of "
                "this name would not be noticed"
            )
            (directory / _LOCK).unlink(missing_ok=True)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (directory / _LOCK).unlink()
            os.close(descriptor)
        for path in made:
            with suppress(OSError):  # it holds a run now
                path.rmdir()


def _lock(directory: Path, wait_s: float) -> int:
    """The descriptor that holds the lock, which says whose it is."""
    path = directory / _LOCK
    deadline = time.monotonic() + wait_s
    while True:
        descriptor = _open(path)
        try:
            if _taken(descriptor, path):
                os.ftruncate(descriptor, 0)
                owner = f"process {os.getpid()} on {socket.gethostname()}"
                os.write(descriptor, owner.encode())
                return descriptor
            owner = os.pread(descriptor, MAX_QUOTED, 0).decode(errors="replace")
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise HimoError(
                f"{directory}: in use by {owner or 'another process'}: let it end, or give this "
                "run another --name"
            )
        time.sleep(_POLL_S)


def _taken(descriptor: int, path: Path) -> bool:
    try:
        # Not flock, whose locks the processes that read data inherit: those may live on a while.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # An owner that ends removes its file: of that one the lock is worth nothing.
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
            return False
        raise


def _open(path: Path) -> int:
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else (error.strerror or "").lower()
        raise HimoError(f"{path}: cannot be locked: {what}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        raise HimoError(f"{path}: cannot be locked: expected a regular file with no other name")
    return descriptor


def _clean(directory: Path) -> None:
    found = [remove_abandoned(folder) for folder in (directory, directory / CHECKPOINTS)]
    files, size = (sum(part) for part in zip(*found, strict=True))
    if files:
        print(f"{directory}: removed {files} unfinished files of killed saves, {size:,} bytes")


def saved_state(settings: TrainConfig) -> State | None:
    """The state from which --resume goes on; None to begin.

    Raises:
        HimoError: the folder already holds a run, or another one than that of the state; or as
            `training_state.find_state`.
    """
    directory, checkpoints = settings.folder, settings.folder / CHECKPOINTS
    holds_run = (directory / METRICS).exists() or bool(saved_states(checkpoints))
    if not settings.resume:
        if holds_run:
            raise HimoError(
                f"{directory}: already holds a run: continue it with --resume latest, or give "
                "this one another --name"
            )
        return None
    state = find_state(settings.resume, checkpoints)
    if state is not None and holds_run and state.path.resolve().parent != checkpoints.resolve():
        raise HimoError(
            f"{directory}: already holds another run than that of --resume {state.path}: give "
            "this one another --name"
        )
    return state


def start(settings: TrainConfig, state: State | None, changes: Sequence[Change]) -> None:
    """Prepares the folder for a run that begins, or goes on from a state; says what changed.

    metrics.jsonl goes back to the state and records the changes; states past it are set aside;
    config.json has the settings now, and an account of the starts.

    Raises:
        HimoError: a file cannot be written.
    """
    directory, checkpoints = settings.folder, settings.folder / CHECKPOINTS
    step = 0 if state is None else state.step
    if state is not None:
        missing = unchecked(state.record)
        if missing:
            note(f"{state.path}: of an older himo: cannot tell whether {missing} are the same")
        if changes:
            note(f"{directory}: goes on with changes: {'; '.join(c.note() for c in changes)}")
    elif settings.resume:
        print(f"{checkpoints}: no checkpoint yet, starting from the beginning")
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for path in set_aside(checkpoints, step):
            note(f"{path.name}: of a step past {step}, from where the run goes on another way")
        _write_config(settings, step)
    except OSError as error:
        raise HimoError(f"{directory}: cannot be written: {error.strerror}") from error
    unreadable = TrainingLog(directory / METRICS).resumed(
        step, {c.name: c.values() for c in changes}
    )
    if unreadable:
        note(f"{directory / METRICS}: {unreadable} unreadable lines are left out")


def _write_config(settings: TrainConfig, step: int) -> None:
    path = settings.folder / "config.json"
    values = dataclasses.asdict(settings)
    versions = {"himo": himo_kernels.__version__, "torch": torch.__version__}
    before = _read(path)
    changes = {
        name: [before[name], value]
        for name, value in values.items()
        if name in before and before[name] != value
    }
    earlier = before.get("starts")
    starts = earlier if isinstance(earlier, list) else []
    this = {"step": step, "command": sys.argv, "versions": versions, "changes": changes}
    content = {**values, "versions": versions, "command": sys.argv, "starts": [*starts, this]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """What config.json held before; one that cannot be read is kept under another name."""
    if not os.path.lexists(path):
        return {}
    try:
        with open_regular(path) as file:
            content = json_value(file.read(_LARGEST))
        if isinstance(content, dict):
            return content
        reason = f"expected an object, got {type(content).__name__}"
    except ValueError as error:  # HimoError is one
        reason = shortened(str(error).removeprefix(f"{path}: "))
    kept = path.with_name(f"{path.name}.damaged")
    path.rename(kept)
    note(f"{path}: cannot be read ({reason}), kept as {kept.name}")
    return {}
