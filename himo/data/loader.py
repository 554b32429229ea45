"""Batches from worker processes, without a trace in the global random state."""

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
    """Yields the batches of an epoch, counts its bad samples and moves its sampler on.

    When a batch is handed out, `sampler.position` lies behind it: a state saved after the step on
    that batch resumes with the next one. Batches that workers have ready do not count.

    The workers stay for the next epoch. They are stopped when the iteration ends in any other way
    than by its last batch, and started anew by the next one.
    """

    def __init__(
        self, make: Callable[[], DataLoader[Sample]], sampler: EpochSampler, bad: BadSamples
    ) -> None:
        self._make = make
        self._loader = make()
        self._running: list[Iterator[Sample]] = []  # whose workers there are
        # Also at exit, before multiprocessing ends them by a signal that they outlive for a while.
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
    # By name, because a DataLoader that the garbage collector finds in a cycle, as with the frames
    # of an exception, has lost the queues through which it stops its workers, and waits 5 seconds
    # for each of them.
    for batches in running:
        getattr(batches, "_shutdown_workers", lambda: None)()
    running.clear()


def _next(batches: Iterator[Sample]) -> Sample | None:
    """The next batch, or None at the end; what the loader raises about its workers is HimoError."""
    try:
        return next(batches, None)
    except HimoError as error:
        raise _from_worker(error) from error
    except RuntimeError as error:
        # DataLoader's own words about its workers begin with its name; what was raised in a worker
        # begins with "Caught" and is a fault to be seen whole.
        if not str(error).startswith("DataLoader"):
            raise
        raise HimoError(_stopped(error)) from error


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Makes one line of the death of a worker, wherever the main process learns of it.

    torch raises an error where the signal finds the main thread: in a step of the model as well as
    in the loader.

    Raises:
        HimoError: a worker died, as one that the system kills where memory runs out.
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
    """Torch's word about a dead worker among an error and what caused it."""
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

    The batches are the same for any number of workers. `iter` of a DataLoader draws from the
    global random generator, which changes every later dropout mask of a run that was resumed
    within an epoch; this one draws from a generator of its own.

    Args:
        dataset: the samples.
        sampler: its length is that of `dataset`.
        workers: processes that decode; 0 decodes in this one.
        seed: of the generator that the workers are seeded from.
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
    # Ctrl-C and a scheduler's SIGTERM go to the whole process group. The training process ends
    # its run in order, with a checkpoint; a worker that died at once would turn that into a
    # crash. It does die a little later: SIGTERM is also how a parent that exits ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever the parent had set
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))


def _from_worker(error: HimoError) -> HimoError:
    """The error as it was raised: DataLoader puts the traceback of the worker in its message."""
    name = f"{type(error).__name__}: "
    if "Original Traceback" not in str(error) or name not in str(error):
        return error
    return HimoError(str(error).rpartition(name)[2].removesuffix("\\n"))
