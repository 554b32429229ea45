"""Batches from worker processes, without a change to the global random state."""

import weakref
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader

from himo.data.dataset import BadSamples, CaptionedImages, Sample
from himo.data.sampler import EpochSampler
from himo.data.workers import TIMEOUT_S, next_item, outlive_a_stop_request, stop
from himo.errors import HimoError


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
        weakref.finalize(self, stop, self._running)
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
            while (batch := next_item(batches)) is not None:
                self.bad.update(batch)
                self.sampler.advance()
                yield batch
            through = True
        finally:
            if not through:
                stop(self._running)
                self._loader = self._make()


def make_loader(
    dataset: CaptionedImages,
    sampler: EpochSampler,
    *,
    workers: int = 0,
    seed: int = 0,
    max_bad_fraction: float = 0.01,
    timeout_s: float = TIMEOUT_S,
    pin_memory: bool = False,
) -> BatchLoader:
    """The batches of a data set in the order of a sampler.

    The batches are the same for any number of workers. By default `iter` of a DataLoader draws from
    the global random generator, which would change every later dropout mask of a run resumed within
    an epoch; this one has a generator of its own.

    Args:
        dataset: the samples.
        sampler: as long as `dataset`.
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
            worker_init_fn=outlive_a_stop_request,
            timeout=timeout_s if workers else 0,
            pin_memory=pin_memory,
        )

    return BatchLoader(make, sampler, BadSamples(dataset.index, max_bad_fraction))
