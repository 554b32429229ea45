"""The processes of one training run under torchrun: set-up, signs of life, and an end for all.

A process that is killed, stopped or raises must not leave the others waiting in a collective. Each
writes a sign of life to torchrun's store every second and watches its neighbour's; what raises
leaves its reason there. Whoever finds a reason, or silence, prints it and ends.

By hand because torchrun acts on an exit alone: by itself it leaves a stopped rank for 83 s, its
`@record` tells no other rank the reason, and the run ends 19 s after a kill, 23 s after a raise.
"""

import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
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

_BEAT_S = 1.0
_LOOK_S = 0.1
# A collective waits for so long: for a process that lives and yet does not come. Reading data has
# a shorter limit of its own, saving and validating a large model may take minutes.
_STUCK = timedelta(minutes=30)
_LEAVING, _FAILED, _SILENT = "leaving", "failed", "silent"


class Ranks:
    """This process among those of the run; alone where torchrun started none beside it."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process for --device NAME: a GPU of its own where there are GPUs."""
        return name

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients are the means over ranks."""
        return module

    def mean(self, values: Tensor) -> Tensor:
        """The means over ranks."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        return [value]

    def any(self, flag: bool) -> "Vote":
        """Starts to find out whether the flag is set on any rank."""
        return Vote(flag)

    def barrier(self) -> None:
        """Waits until every rank is here."""

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the body on rank 0, then on the others, which find what it wrote."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


class Vote:
    """A flag of all ranks, once `result` is asked for."""

    def __init__(self, flag: bool) -> None:
        self._flag = flag

    def result(self) -> bool:
        return self._flag


class _ManyRanks(Ranks):
    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # gloo takes the address of the host's name otherwise, and aborts where it has none.
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
        # Small things of the host go by a group of their own, and make no GPU wait.
        self._control = dist.new_group(backend="gloo", timeout=_STUCK) if on_gpu else None

    def device(self, name: str) -> str:
        if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
            return f"cuda:{self._local_rank}"
        return name

    def wrap(self, module: nn.Module) -> nn.Module:
        return DistributedDataParallel(module)

    def mean(self, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def any(self, flag: bool) -> Vote:
        return _RunningVote(flag, self._control)

    def barrier(self) -> None:
        dist.all_reduce(torch.zeros(1), group=self._control)


class _RunningVote(Vote):
    def __init__(self, flag: bool, group: dist.ProcessGroup | None) -> None:
        self._flags = torch.tensor(float(flag))
        self._work = dist.all_reduce(self._flags, group=group, async_op=True)

    def result(self) -> bool:
        self._work.wait()
        return bool(self._flags)


@contextmanager
def join(device: str, timeout_s: float) -> Iterator[Ranks]:
    """Joins the processes that torchrun started, and leaves them in order at the end of the body.

    An exception in the body ends this process, and the others with its reason: a group that has
    lost a member cannot be closed in order. Status 2 for HimoError, 1 for any other.

    Args:
        device: as --device.
        timeout_s: seconds without a sign of life after which a process counts as gone, and is
            killed if it is not.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    watch = _Watch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout_s)
    try:
        yield _ManyRanks(device)
        gc.collect()  # DDP's reducer, in a cycle with its module, must go before the group
        watch.leave()
        dist.destroy_process_group()
    except BaseException as error:
        watch.end_after(error)


def _store(use: str) -> PrefixStore:
    # A connection of its own for each use: one that waits in a collective's set-up would hold up
    # the other. By attempt: after --max-restarts torchrun's store may still hold the addresses of
    # processes that are gone.
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
    """Signs of life of this process, and the watch over the next one's."""

    def __init__(self, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store = _store("watch")
        self._store.set(f"host/{rank}", f"{os.getpid()} on {socket.gethostname()}")
        self._store.set(f"beat/{rank}", "0")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="himo-watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Says that this process is through, so that its silence means nothing."""
        self._quiet()
        self._store.set(f"beat/{self.rank}", _LEAVING)

    def end_after(self, error: BaseException) -> NoReturn:
        """Prints the reason, leaves it to the others and ends the process."""
        # torchrun asks the others to end as soon as one has: not before they have said why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._quiet()
        status = 2 if isinstance(error, HimoError) else 1
        try:
            self._store.set(f"beat/{self.rank}", _LEAVING)  # whose silence is not the cause
            # RuntimeError is what gloo and NCCL raise where a peer is gone.
            if isinstance(error, RuntimeError) and (cause := self._cause()):
                self._end_because(cause)
            message = str(error)
            if not isinstance(error, HimoError):
                traceback.print_exception(error)
                message = f"{type(error).__name__}: {message.partition(chr(10))[0]}"
            if not message.startswith("rank "):  # said of one rank by all of them
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
        # The first reason stands: what fails after it fails because of it.
        self._store.compare_set(_FAILED, "", message)

    def _run(self) -> None:
        watched = (self.rank + 1) % self.size
        beats, last, heard = 0, "", time.monotonic()
        while not self._stop.wait(_BEAT_S):
            try:
                beats += 1
                self._store.set(f"beat/{self.rank}", str(beats))
                if self._store.check([_FAILED]):
                    # The main thread may be reporting the same: give it the first word.
                    if not self._stop.wait(2 * _BEAT_S):
                        self._end_because(self._store.get(_FAILED).decode())
                beat = self._beat(watched)
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

    def _beat(self, rank: int) -> str:
        key = f"beat/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _where(self, rank: int) -> str:
        key = f"host/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _describe(self, rank: int) -> str:
        where = self._where(rank)
        return f"rank {rank} ({f'process {where}' if where else 'not yet started'})"

    def _cause(self) -> str | None:
        # Why contact was lost: a reason that a rank left, or the one whose signs have ceased.
        before = [self._beat(rank) for rank in range(self.size)]
        for _ in range(round(4 * _BEAT_S / _LOOK_S)):
            if self._store.check([_FAILED]):
                return self._store.get(_FAILED).decode()
            time.sleep(_LOOK_S)
        silent = [
            rank
            for rank, beat in enumerate(before)
            if beat != _LEAVING and self._beat(rank) == beat
        ]
        if not silent:
            return None
        reason = f"{self._describe(silent[0])} ended without a word: killed, or out of memory"
        self._tell(reason)
        return self._store.get(_FAILED).decode()

    def _kill_silent(self) -> None:
        # A stopped process does not hear torchrun's SIGTERM; its SIGKILL comes 30 s later.
        if not self._store.check([_SILENT]):
            return
        pid, _, host = self._where(int(self._store.get(_SILENT))).partition(" on ")
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
    sys.stdout.flush()
    print(f"himo: error: {message}", file=sys.stderr, flush=True)
    os._exit(status)
