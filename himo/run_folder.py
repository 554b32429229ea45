"""The folder of a run: its lock, the removal of unfinished files, and a record of its starts."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import himo_kernels
from himo import checkpoint
from himo.config import TrainConfig
from himo.errors import MAX_QUOTED, HimoError, note, shortened
from himo.files import json_value, open_regular, remove_abandoned, write_text
from himo.resume import Change, unchecked
from himo.training_log import TrainingLog
from himo.training_state import State, find_state, saved_states, set_aside

CHECKPOINTS, METRICS, BEST = "checkpoints", "metrics.jsonl", "best.safetensors"
_MODEL = re.compile(r"epoch_([0-9]{1,12})\.safetensors")
_LOCK = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_LARGEST = 64 << 20  # bytes of a config.json; a start takes 1,000
_WAIT_S, _RESTART_WAIT_S, _POLL_S = 2.0, 60.0, 0.05  # for an owner that is ending


@contextmanager
def owned(directory: Path, wait_s: float | None = None) -> Iterator[None]:
    """Locks the folder of a run until the body ends, so that one process writes it.

    Creates the folder, and removes it again if the body leaves it empty. Removes the unfinished
    files of killed saves. The kernel releases the lock when the process ends, however it ends. In
    a file system without locks the user is told, and nothing is removed.

    Args:
        directory: the folder.
        wait_s: seconds to wait for another owner to end. By default 2, or 60 after a restart by
            torchrun, whose earlier processes may still be ending.

    Raises:
        HimoError: another process owns it (the message names it); or it cannot be written.
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
    """The descriptor of the lock file, which names its owner."""
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
        # Not flock: the loader's workers would inherit the lock, and may outlive this process.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last owner may have removed the file meanwhile. A lock on it protects nothing.
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
    """The state that --resume continues from; None to start from the beginning.

    Raises:
        HimoError: the folder holds a run already and this is no dry run, or another run than the
            state's; or as `training_state.find_state`.
    """
    directory, checkpoints = settings.folder, settings.folder / CHECKPOINTS
    holds_run = (directory / METRICS).exists() or bool(saved_states(checkpoints))
    if not settings.resume:
        if holds_run:
            said = (
                f"{directory}: already holds a run: continue it with --resume latest, or give "
                "this one another --name"
            )
            if not settings.dry_run:
                raise HimoError(said)
            note(said)
        return None
    state = find_state(settings.resume, checkpoints)
    if state is not None and holds_run and state.path.resolve().parent != checkpoints.resolve():
        raise HimoError(
            f"{directory}: already holds another run than that of --resume {state.path}: give "
            "this one another --name"
        )
    return state


def model_name(epoch: int) -> str:
    """The file of the model after this many epochs."""
    return f"epoch_{epoch}.safetensors"


def saved_models(directory: Path, epoch: int) -> list[Path]:
    """The models of the epochs up to this one, oldest first."""
    found = ((_MODEL.fullmatch(path.name), path) for path in directory.glob("epoch_*"))
    numbered = [(int(match[1]), path) for match, path in found if match is not None]
    return [path for number, path in sorted(numbered) if number <= epoch]


def keeps_best(directory: Path, step: int) -> bool:
    """Whether the best model of a run is there and of this step. One of another step is set aside.

    A run that continues from an earlier state may take other steps than the run before.
    """
    path = directory / CHECKPOINTS / BEST
    try:
        _, metadata = checkpoint.read_state_dict(path)
    except HimoError:  # it is not there, or damaged
        return False
    if metadata["provenance"].get("training", {}).get("step") == step:
        return True
    path.rename(f"{path}.set-aside")
    note(f"{path.name}.set-aside: of another step than the best of this run, {step}")
    return False


def start(
    settings: TrainConfig,
    state: State | None,
    changes: Sequence[Change],
    choice: Mapping[str, Any],
) -> None:
    """Prepares the folder for a run that begins or continues from a state; prints what changed.

    metrics.jsonl is cut to the state's step and records the changes. Later states are set aside.
    config.json gets the settings, which of them the recipe chose, and a record of the starts.

    Raises:
        HimoError: a file cannot be written.
    """
    directory, checkpoints = settings.folder, settings.folder / CHECKPOINTS
    step = 0 if state is None else state.step
    if state is not None:
        if missing := unchecked(state.record):
            note(f"{state.path}: of an older himo: cannot tell whether {missing} are the same")
        if changes:
            note(f"{directory}: goes on with changes: {'; '.join(c.note() for c in changes)}")
    elif settings.resume:
        print(f"{checkpoints}: no checkpoint yet, starting from the beginning")
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for path in set_aside(checkpoints, step):
            note(f"{path.name}: of a step past {step}, from where the run goes on another way")
        _write_config(settings, step, choice)
    except OSError as error:
        raise HimoError(f"{directory}: cannot be written: {error.strerror}") from error
    metrics = directory / METRICS
    if unreadable := TrainingLog(metrics).resumed(step, {c.name: c.values() for c in changes}):
        note(f"{metrics}: {unreadable} unreadable lines are left out")


def _write_config(settings: TrainConfig, step: int, choice: Mapping[str, Any]) -> None:
    path = settings.folder / "config.json"
    values = dataclasses.asdict(settings)
    versions = {"himo": himo_kernels.__version__, "torch": torch.__version__}
    before = _read(path)
    known = values.keys() & before.keys()
    changes = {n: [before[n], v] for n, v in values.items() if n in known and before[n] != v}
    starts = before.get("starts")
    starts = starts if isinstance(starts, list) else []
    this = {"step": step, "command": sys.argv, "versions": versions, "changes": changes}
    content = {**values, "versions": versions, "command": sys.argv, "starts": [*starts, this]}
    content["chosen"] = choice or before.get("chosen", {})  # at the start, by the recipe
    write_text(path, json.dumps(content, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """The earlier content of config.json; a file that cannot be read is renamed."""
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
    damaged = path.rename(path.with_name(f"{path.name}.damaged"))
    note(f"{path}: cannot be read ({reason}), kept as {damaged.name}")
    return {}
