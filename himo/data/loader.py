"""Batches from worker processes, without a change to the global random state."""

import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader

from himo.data.dataset import BadSamples, CaptionedImages, Sample
from himo.data.sampler import EpochSampler
from himo.errors import HimoError

_GRACE_S = 10  # seconds from SIGTERM to the end of a worker


class BatchLoader:
    """Yields the batches of an epoch, counts its bad samples and advances its sampler.

    When a batch is handed out, `sampler.position` is behind it: a state saved after the step on
    that batch resumes with the next one. Batches that workers have prefetched do not count.

    The workers are reused in the next epoch. If an iteration ends before its last batch, they are
    stopped, and the next iteration starts new ones.
    """

    def __init__(
        self, make: Callable[[], DataLoader[Sample]], sampler: EpochSampler, bad: BadSamples
    ) -> None:
        self._make = make
        self._loader = make()
        self._running: list[Iterator[Sample]] = []  # the iterator that has workers
        # Also at exit, before multiprocessing sends the signal that workers outlive for a while.
        weakref.finalize(self, _stop, self._running)
        self.sampler, self.bad = sampler, bad

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Sample]:
        """Yields batches from the position of the sampler to the end of its epoch.

        Raises:
            HimoError: too many bad samples; a worker that died or takes longer than the timeout.
        """
        batches = iter(self._loader)
        self._running[:] = [batches]
        through = False
        try:
            while (batch := _next(batches)) is not None:
                self.bad.update(batch)
                self.sampler.advance()
                yield batch
            through = True
        finally:
            if not through:
                _stop(self._running)
                self._loader = self._make()


def _stop(running: list[Iterator[Sample]]) -> None:
    # Explicitly, because a DataLoader that is collected in a cycle, as with the frames of an
    # exception, has lost the queues that stop its workers, and waits 5 seconds for each.
    for batches in running:
        getattr(batches, "_shutdown_workers", lambda: None)()
    running.clear()


def _next(batches: Iterator[Sample]) -> Sample | None:
    """The next batch, or None at the end; HimoError if a worker died or raised one."""
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


def make_loader(
    dataset: CaptionedImages,
    sampler: EpochSampler,
    *,
    workers: int = 0,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
    timeout_s: float = 300.0,
    pin_memory: bool = False,
) -> BatchLoader:
    """The batches of a data set in the order of a sampler.

    The batches are the same for any number of workers. By default `iter` of a DataLoader draws from
    the global random generator, which would change every later dropout mask of a run resumed within
    an epoch; this one has a generator of its own.

    Args:
        dataset: the samples.
        sampler: its length is that of `dataset`.
        workers: processes that decode; 0 decodes in this one.
        seed: of the generator that seeds the workers.
        max_bad_fraction: see `BadSamples`.
        timeout_s: seconds to wait for a batch of the workers.
        pin_memory: copies batches to page-locked memory, for a GPU.
    """
    if workers < 0:
        raise HimoError(f"workers: expected at least 0, got {workers}")
    if sampler.length != len(dataset):
        raise HimoError(f"sampler has {sampler.length} samples, the data set has {len(dataset)}")

    def make() -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            generator=torch.Generator().manual_seed(seed),
            persistent_workers=workers > 0,
            worker_init_fn=_outlive_a_stop_request,
            timeout=timeout_s if workers else 0,
            pin_memory=pin_memory,
        )

    return BatchLoader(make, sampler, BadSamples(dataset.index, max_bad_fraction))


def _outlive_a_stop_request(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group. The training process then
    # writes a checkpoint before it ends; a worker that died at once would make it crash. The worker
    # dies a little later, because a parent that exits ends its workers by SIGTERM too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not the parent's handler
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))
