"""Worker processes of torch's DataLoader: items in order, their errors as one line, their end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from himo.errors import HimoError

TIMEOUT_S = 300.0  # for an item or a batch of the workers
_GRACE_S = 10  # seconds from SIGTERM to the end of a worker
_T = TypeVar("_T")


def _unchanged(item: _T) -> _T:
    return item


def in_order(items: Dataset[_T], workers: int) -> Iterator[_T]:
    """Yields the items of a data set one by one, made in order by worker processes; 0: by this one.

    Raises:
        HimoError: a worker died or takes longer than TIMEOUT_S; the error of an item.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,  # else bytes would become tensors
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=outlive_a_stop_request,
        timeout=TIMEOUT_S if workers else 0,
    )
    running: list[Iterator[_T]] = [iter(loader)]
    try:
        while (item := next_item(running[0])) is not None:
            yield item
    finally:
        stop(running)


def stop(running: list[Iterator[Any]]) -> None:
    """Stops the workers of these iterators and empties the list."""
    # Explicitly, because a DataLoader that is collected in a cycle, as with the frames of an
    # exception, has lost the queues that stop its workers, and waits 5 seconds for each.
    for batches in running:
        getattr(batches, "_shutdown_workers", lambda: None)()
    running.clear()


def next_item(batches: Iterator[_T]) -> _T | None:
    """The next batch or item, or None at the end; HimoError if a worker died or raised one."""
    try:
        return next(batches, None)
    except HimoError as error:
        # DataLoader puts the traceback of the worker in the message: the error is its last line.
        name = f"{type(error).__name__}: "
        if "Original Traceback" not in str(error) or name not in str(error):
            raise
        raise HimoError(str(error).rpartition(name)[2].removesuffix("\\n")) from error
    except RuntimeError as error:
        # DataLoader's own messages about its workers begin with its name; an exception in a worker
        # begins with "Caught", is a bug, and keeps its traceback.
        if not str(error).startswith("DataLoader"):
            raise
        raise HimoError(_stopped(error)) from error


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turns torch's error about the death of a worker into one line.

    torch raises it wherever the main thread is at the signal: in a step of the model or in the
    loader.

    Raises:
        HimoError: a worker died, for example because the system killed it when memory ran out.
    """
    try:
        yield
    except HimoError:
        raise
    except Exception as error:
        death = _death(error)
        if death is None:
            raise
        raise HimoError(_stopped(death)) from error


def _death(error: BaseException | None) -> BaseException | None:
    """torch's error about a dead worker, among an error and its causes."""
    while error is not None:
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            return error
        error = error.__cause__ or error.__context__
    return None


def _stopped(error: BaseException) -> str:
    words = str(error).strip().removesuffix(".")
    advice = "; where memory ran out, fewer --workers need less" if _death(error) else ""
    return f"loading stopped: {words}{advice}"


def outlive_a_stop_request(worker: int) -> None:
    """Lets a worker live on for a while after Ctrl-C or SIGTERM."""
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group. The training process then
    # writes a checkpoint before it ends; a worker that died at once would make it crash. The worker
    # dies a little later, because a parent that exits ends its workers by SIGTERM too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the parent's handler
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))
