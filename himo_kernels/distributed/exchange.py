"""How the keys of other ranks come to this one: all at once, or block by block around a ring.

Both give the same blocks of (first column, keys, table of the keys' rows), and bring the gradients
of keys back to their owner. A strategy is used for one forward and any number of backwards of it.
"""

from collections.abc import Iterator

from torch import Tensor

from himo_kernels.distributed.wire import Rows, Transfer, pack_rows, unpack_rows

Block = tuple[int, Tensor, Tensor]


class Gathered:
    """One block of all keys [N, C], kept for the backward: O(N D) memory, two collectives."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._keys: Tensor | None = None
        self._partial: Tensor | None = None

    def blocks(self, keys: Tensor, table: Tensor) -> Iterator[Block]:
        """Yields the blocks, of own keys [M, C] and own table [M, T]."""
        if self._keys is None:
            gathered = self._rows.all_gather(pack_rows(keys, table))
            self._keys, all_table = unpack_rows(gathered, keys, table)
        else:
            all_table = self._rows.all_gather(table)
        yield 0, self._keys, all_table

    def add(self, partial: Tensor) -> None:
        """Takes this rank's gradients of the keys of the block that was yielded last."""
        self._partial = partial

    def collect(self) -> Tensor:
        """Returns the sum over ranks of the gradients of own keys [M, C]."""
        partial, self._partial = self._partial, None
        if partial is None:
            raise RuntimeError("collect: expected a block to have been added")
        return self._rows.reduce_scatter(partial)


class Ring:
    """One block for each rank, passed on from rank to rank: O(N D / W) memory.

    At every step the next block is under way while this one is used. Gradients follow their keys
    one step behind, each rank adding its part, and are home after as many steps as there are ranks.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._owner = rows.rank
        self._arriving: Transfer | None = None

    def blocks(self, keys: Tensor, table: Tensor) -> Iterator[Block]:
        """Yields the blocks, own ones first; of own keys [M, C] and own table [M, T]."""
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
        """Takes this rank's gradients of the keys of the block that was yielded last."""
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
