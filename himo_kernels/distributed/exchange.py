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

    The next block is in transfer while the current one is used. The gradients of a block follow it
    one step behind, in the same group of calls as the keys of that step; each rank adds its part.
    They are back at their owner after W steps.
    """

    _partial: Tensor | None  # the gradients of the last block, to be sent on
    _arriving: Transfer | None

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._begin()

    def blocks(self, keys: Tensor, table: Tensor) -> Iterator[Block]:
        """Yields the blocks, own block first. Takes own keys [M, C] and own table [M, T]."""
        rows, size = self._rows, self._rows.members.size
        self._begin()
        current = pack_rows(keys, table)
        spaces: list[Tensor] = []  # two, which later steps use alternately
        into = None  # buffer of the gradients, which are used up within a step
        for step in range(size):
            owner = (rows.rank - step) % size
            sent: dict[str, tuple[Tensor, Tensor]] = {}
            if step + 1 < size:
                if step < 2:
                    spaces.append(_space_of_any(rows, current))
                sent["keys"] = current, spaces[step % 2][: rows.counts[(owner - 1) % size]]
            if self._partial is not None:
                if into is None:
                    into = _space_of_any(rows, self._partial)
                sent["gradients"] = self._partial, into[: rows.counts[owner]]
            self._arriving = rows.shift(sent)
            self._partial = None
            block, its_table = unpack_rows(current, keys, table)
            yield rows.first(owner), block, its_table
            current = self._arriving.wait().get("keys", current)

    def _begin(self) -> None:
        # Also after a backward that failed.
        self._partial = self._arriving = None

    def add(self, partial: Tensor) -> None:
        """Adds this rank's gradients of the keys in the last block yielded."""
        if self._arriving is None:
            raise RuntimeError("add: expected a block to have been yielded")
        before = self._arriving.wait().get("gradients")
        if before is not None:
            partial += before
        self._partial = partial

    def collect(self) -> Tensor:
        """Returns the sum over ranks of the gradients of own keys [M, C]."""
        partial, self._partial, self._arriving = self._partial, None, None
        if partial is None:
            raise RuntimeError("collect: expected blocks to have been added")
        own = partial.new_empty((self._rows.own, *partial.shape[1:]))
        return self._rows.shift({"gradients": (partial, own)}).wait()["gradients"]


def _space_of_any(rows: Rows, block: Tensor) -> Tensor:
    # For a block of any rank.
    return block.new_empty((max(rows.counts), *block.shape[1:]))


STRATEGIES: dict[str, type[Gathered] | type[Ring]] = {"gather": Gathered, "ring": Ring}
