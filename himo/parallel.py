"""The processes of one training run under torchrun: set-up, heartbeats, and a common end.

A process that is killed, is stopped or raises must not leave the others waiting in a collective.
Each writes a heartbeat to torchrun's store every second and watches the next rank's. A process
that raises writes its reason there. A process that finds a reason, or no heartbeat, prints it and
exits.

torchrun alone acts only on an exit: a stopped rank stays for 83 s, `@record` tells no other rank
the reason, and the run ends 19 s after a kill, 23 s after a raise.
"""

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.nn.parallel import DistributedDataParallel

from himo.errors import HimoError
from himo.sharding import shard

_BEAT_S = 1.0
_LOOK_S = 0.1
# Timeout of a collective that a live process never joins. Reading data has a shorter limit; saving
# and validating a large model may take minutes.
_STUCK = timedelta(minutes=30)
_LEAVING, _FAILED, _SILENT = "leaving", "failed", "silent"

joined = False  # has this process been one of several?


class Ranks:
    """The process's place in the run. This class itself is for a run of one process."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process for --device NAME; of several GPUs, its own."""
        return name

    def wrap(self, module: nn.Module, *, sharded: bool = False) -> nn.Module:
        """The module, wrapped so that its gradients are means over ranks.

        Args:
            sharded: each rank holds a part of the parameters; see himo/sharding.py.
        """
        return module

    def mean(self, values: Tensor) -> Tensor:
        """The means over ranks."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        return [value]

    def any(self, flag: bool) -> Callable[[], bool]:
        """Starts a vote: is the flag set on any rank? Calling the result waits for the answer."""
        return lambda: flag

    def barrier(self) -> None:
        """Waits until every rank is here."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the body on rank 0, then on the others, which find the files that it wrote."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


class _ManyRanks(Ranks):
    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # Otherwise gloo resolves the host's name, and aborts if it has no address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device = self.device(device)
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=_STUCK,
            store=_store("group"),
            rank=self.rank,
            world_size=self.size,
        )
        # Small values on the host use a separate group, so that no GPU waits.
        self._control = dist.new_group(backend="gloo", timeout=_STUCK) if on_gpu else None

    def device(self, name: str) -> str:
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self._local_rank}"
        return name

    def wrap(self, module: nn.Module, *, sharded: bool = False) -> nn.Module:
        return shard(module) if sharded else DistributedDataParallel(module)

    def mean(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def any(self, flag: bool) -> Callable[[], bool]:
        flags = torch.tensor(float(flag))
        work = dist.all_reduce(flags, group=self._control, async_op=True)

        def result() -> bool:
            work.wait()
            return bool(flags)

        return result

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._control)


@contextmanager
def join(device: str, timeout_s: float) -> Iterator[Ranks]:
    """Joins the processes that torchrun started; closes the group at the end of the body.

    An exception in the body ends this process and, with its reason, the others: a group that has
    lost a member cannot be closed. The status is 2 for HimoError, 1 for any other.

    Args:
        device: as --device.
        timeout_s: seconds without a heartbeat after which a process is considered gone and killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    global joined
    joined = True
    watch = _Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s)
    try:
        yield _ManyRanks(device)
        gc.collect()  # DDP's reducer, in a cycle with its module, must go before the group
        watch.leave()
        dist.destroy_process_group()
    except BaseException as error:
        watch.end_after(error)


def end_process(status: int = 0) -> NoReturn:
    """Ends one process of several, after `join`, without the end of its interpreter.

    gloo's threads outlive their group after functional collectives and DDP. One that drops a tensor
    while the interpreter ends aborts the process (pytorch/pytorch#190489).
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):  # a stream is closed
        pass
    finally:
        os._exit(status)


def _store(use: str) -> PrefixStore:
    # Each use has its own connection, because a connection is blocked while the group is set up.
    # Keys contain the restart count, because torchrun's store may still hold the addresses of the
    # processes before a restart.
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0"
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        multi_tenant=True,
        wait_for_workers=False,
    )
    return PrefixStore(f"himo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{use}", store)


class _Watch:
    """Writes the heartbeat of this process and watches the next rank's."""

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store = _store("watch")
        self._store.set(f"host/{rank}", f"{os.getpid()} on {socket.gethostname()}")
        self._store.set(f"beat/{rank}", "0")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="himo-watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Marks this process as finished, so that a missing heartbeat is no failure."""
        self._quiet()
        self._store.set(f"beat/{self.rank}", _LEAVING)

    def end_after(self, error: BaseException) -> NoReturn:
        """Prints the reason, tells the others and ends the process."""
        # torchrun sends SIGTERM as soon as one process has ended; the reason is printed first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._quiet()
        status = 2 if isinstance(error, HimoError) else 1
        try:
            self._store.set(f"beat/{self.rank}", _LEAVING)  # a missing heartbeat is not the cause
            # gloo and NCCL raise RuntimeError if a peer is gone.
            if isinstance(error, RuntimeError) and (cause := self._cause()):
                self._end_because(cause)
            message = str(error)
            if not isinstance(error, HimoError):
                traceback.print_exception(error)
                message = f"{type(error).__name__}: {message.partition(chr(10))[0]}"
            if not message.startswith("rank "):  # else all ranks raised this error
                message = f"rank {self.rank}: {message}"
            self._tell(message)
        except (RuntimeError, OSError):  # the store went with the process that held it
            message = f"rank {self.rank}: lost contact with the other processes: {error}"
        _end(message, status)

    def _quiet(self) -> None:
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * _BEAT_S)

    def _tell(self, message: str) -> None:
        # The first reason is not overwritten: later failures follow from it.
        self._store.compare_set(_FAILED, "", message)

    def _run(self) -> None:
        watched = (self.rank + 1) % self.size
        beats, last, heard = 0, "", time.monotonic()
        while not self._stop.wait(_BEAT_S):
            try:
                beats += 1
                self._store.set(f"beat/{self.rank}", str(beats))
                reason = self._read(_FAILED)
                # The main thread may be about to report the same.
                if reason and not self._stop.wait(2 * _BEAT_S):
                    self._end_because(reason)
                beat = self._read(f"beat/{watched}")
            except (RuntimeError, OSError):
                if not self._stop.wait(2 * _BEAT_S):
                    self._end_because("torchrun's store is gone, and with it the run")
                return
            if beat != last or beat == _LEAVING:
                last, heard = beat, time.monotonic()
            elif time.monotonic() - heard > self.timeout_s and not self._stop.is_set():
                reason = f"{self._describe(watched)} gave no sign of life for {self.timeout_s:g} s"
                self._store.set(_SILENT, str(watched))
                self._tell(reason)
                self._end_because(reason)

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _describe(self, rank: int) -> str:
        where = self._read(f"host/{rank}")
        return f"rank {rank} ({f'process {where}' if where else 'not yet started'})"

    def _cause(self) -> str:
        # Why contact was lost: the reason of a rank, or a rank without a heartbeat; "" if neither.
        before = [self._read(f"beat/{rank}") for rank in range(self.size)]
        for _ in range(round(4 * _BEAT_S / _LOOK_S)):
            if reason := self._read(_FAILED):
                return reason
            time.sleep(_LOOK_S)
        for rank, beat in enumerate(before):
            if beat != _LEAVING and self._read(f"beat/{rank}") == beat:
                self._tell(f"{self._describe(rank)} ended without a word: killed, or out of memory")
                break
        return self._read(_FAILED)

    def _kill_silent(self) -> None:
        # A stopped process ignores torchrun's SIGTERM, and its SIGKILL comes 30 s later.
        silent = self._read(_SILENT)
        if not silent:
            return
        pid, _, host = self._read(f"host/{silent}").partition(" on ")
        if host == socket.gethostname() and pid and _parent(int(pid)) == os.getppid():
            os.kill(int(pid), signal.SIGKILL)

    def _end_because(self, reason: str) -> NoReturn:
        with suppress(RuntimeError, OSError):  # the store, or the process, is already gone
            self._kill_silent()
        _end(f"rank {self.rank}: ends because of {reason}", 1)


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _end(message: str, status: int) -> NoReturn:
    with suppress(AttributeError, OSError, ValueError):  # it is closed; the reason is printed still
        sys.stdout.flush()
    with suppress(AttributeError, OSError, ValueError):
        print(f"himo: error: {message}", file=sys.stderr)
    end_process(status)
