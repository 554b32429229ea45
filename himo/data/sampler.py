"""The order in which samples are seen: a pure function of seed and epoch."""

from collections.abc import Iterator
from typing import Any

import numpy
from torch.utils.data import Sampler

from himo.errors import HimoError


class EpochSampler(Sampler[list[int]]):
    """Yields, for one rank, the lists of sample numbers of each batch of an epoch.

    The order of an epoch is one permutation of all samples, for any number of ranks. Global batch k
    is its k-th slice of `batch_size * world_size` samples; rank r takes the r-th part of the slice.
    No sample comes twice in an epoch, and none is repeated to fill a batch: in a contrastive loss
    it would be a false negative.

    With `drop_last`, for training, the samples that do not fill a global batch are dropped: every
    rank has the same number of full batches. Without it, for evaluation, they follow in order: the
    last batch of a rank may be smaller, and some ranks may have one batch less.

    To resume within an epoch, save `state_dict` and load it into a sampler of the same length and
    seed: iteration continues with the first sample not yet handed out, also with another batch
    size or number of ranks.

    Args:
        length: number of samples.
        batch_size: samples in a batch of one rank.
        seed: of the permutations, at least 0.
        rank: this process, from 0.
        world_size: number of processes.
        drop_last: drops the samples that do not fill a global batch.
        shuffle: False keeps the order of the data set in every epoch.
        reshuffle: False keeps the order of the first epoch, as the released HiMo-CLIP code.

    Raises:
        HimoError: an argument out of range; with `drop_last`, fewer samples than a global batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        shuffle: bool = True,
        reshuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise HimoError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise HimoError(f"rank: expected 0 to {world_size - 1}, got {rank}")
        if seed < 0:
            raise HimoError(f"seed: expected at least 0, got {seed}")
        if drop_last and length < batch_size * world_size:
            raise HimoError(
                f"{length} samples do not fill one batch of {batch_size} on each of {world_size} "
                "processes: use a smaller batch_size (--batch-size), or --keep-last-batch"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.drop_last, self.shuffle, self.reshuffle = drop_last, shuffle, reshuffle
        self.epoch = 0
        self.position = 0  # samples of this epoch handed out by all ranks together

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch."""
        self.epoch, self.position = epoch, 0

    def advance(self) -> None:
        """Counts one global batch as handed out; a batch that workers prefetch does not count."""
        self.position = min(self.position + self.batch_size * self.world_size, self.length)

    def order(self) -> numpy.ndarray:
        """All samples in the order of this epoch, int64 [length]."""
        if not self.shuffle:
            return numpy.arange(self.length)
        # RandomState, because numpy guarantees its stream; Generator's may change.
        epoch = self.epoch if self.reshuffle else 0
        bits = numpy.random.MT19937(numpy.random.SeedSequence([self.seed, epoch]))
        return numpy.random.RandomState(bits).permutation(self.length)

    def __iter__(self) -> Iterator[list[int]]:
        start, step = self.position, self.batch_size * self.world_size
        end = self.length - (self.length - start) % step if self.drop_last else self.length
        return self._batches(self.order(), range(start, end, step))

    def _batches(self, order: numpy.ndarray, starts: range) -> Iterator[list[int]]:
        for start in starts:
            first = start + self.rank * self.batch_size
            batch = order[first : min(first + self.batch_size, self.length)].tolist()
            if batch:
                yield batch

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        full, rest = divmod(self.length, self.batch_size * self.world_size)
        return full + (not self.drop_last and rest > self.rank * self.batch_size)

    def global_batches(self) -> int:
        """Global batches from the position to the end of the epoch."""
        left, step = self.length - self.position, self.batch_size * self.world_size
        return left // step if self.drop_last else -(-left // step)

    def state_dict(self) -> dict[str, int]:
        """The argument of `load_state_dict`, as plain numbers."""
        return {name: getattr(self, name) for name in ("length", "seed", "epoch", "position")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to the position of another sampler.

        Raises:
            HimoError: the other one had another length or seed, so another order, or the position
                does not exist.
        """
        for name in ("length", "seed"):
            if state[name] != getattr(self, name):
                raise HimoError(
                    f"resume: the order was made with {name} {state[name]}, this run has "
                    f"{getattr(self, name)}"
                )
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.length:
            raise HimoError(f"resume: no sampler was at epoch {epoch}, sample {position}")
        self.epoch, self.position = epoch, position
