"""How a rank receives the keys of the others: all at once, or block by block around a ring.

Both yield blocks of (first column, keys, table with one row per key), and return the gradients of
keys to their owners. An instance serves one forward and any number of its backwards.
"""

from collections.abc import Iterator

from torch import Tensor

from himo_kernels.distributed.wire import Rows, Transfer, pack_rows, unpack_rows

Block = tuple[int, Tensor, Tensor]


class Gathered:
    """One block of all keys [N, C], cached for the backward: O(N D) memory, two collectives."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._keys: Tensor | None = None
        self._partial: Tensor | None = None

    def blocks(self, keys: Tensor, table: Tensor) -> Iterator[Block]:
        """Yields the blocks. Takes own keys [M, C] and own table [M, T]."""
        if self._keys is None:
            gathered = self._rows.all_gather(pack_rows(keys, table))
            self._keys, all_table = unpack_rows(gathered, keys, table)
        elif table.shape[1] == 0:
            all_table = table.new_empty((self._rows.total, 0))
        else:
            all_table = self._rows.all_gather(table)
        yield 0, self._keys, all_table

    def add(self, partial: Tensor) -> None:
        """Adds this rank's gradients of the keys in the last block yielded."""
        self._partial = partial

    def collect(self) -> Tensor:
        """Returns the sum over ranks of the gradients of own keys [M, C]."""
        partial, self._partial = self._partial, None
        if partial is None:
            raise RuntimeError("collect: expected a block to have been added")
        return self._rows.reduce_scatter(partial)


class Ring:
    """One block per rank, passed from rank to rank: O(N D / W) memory.

    At every step the next block is in transfer while the current one is used. Gradients follow one
    step behind their keys; each rank adds its part. They are back at their owner after W steps.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._owner = rows.rank
        self._arriving: Transfer | None = None

    def blocks(self, keys: Tensor, table: Tensor) -> Iterator[Block]:
        """Yields the blocks, own block first. Takes own keys [M, C] and own table [M, T]."""
        rows, size = self._rows, self._rows.members.size
        current = pack_rows(keys, table)
        for step in range(size):
            self._owner = (rows.rank - step) % size
            transfer = None
            if step + 1 < size:
                transfer = rows.shift(current, self._space_for_next(current), tag=0)
            block, its_table = unpack_rows(current, keys, table)
            yield rows.first(self._owner), block, its_table
            if transfer is not None:
                current = transfer.wait()

    def add(self, partial: Tensor) -> None:
        """Adds this rank's gradients of the keys in the last block yielded."""
        if self._arriving is not None:
            partial += self._arriving.wait()
        self._arriving = self._rows.shift(partial, self._space_for_next(partial), tag=1)

    def collect(self) -> Tensor:
        """Returns the sum over ranks of the gradients of own keys [M, C]."""
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            raise RuntimeError("collect: expected blocks to have been added")
        return arriving.wait()

    def _space_for_next(self, block: Tensor) -> Tensor:
        before = (self._owner - 1) % self._rows.members.size
        return block.new_empty((self._rows.counts[before], *block.shape[1:]))


STRATEGIES: dict[str, type[Gathered] | type[Ring]] = {"gather": Gathered, "ring": Ring}
