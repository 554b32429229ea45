"""One small gather before features are sent: all ranks agree on row counts, or all raise.

If ranks call collectives with different shapes, one aborts or the others wait forever. So a rank
whose checks fail reports it first, and all ranks raise the same error, which names that rank.
"""

import zlib
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from himo_kernels._checks import (
    FLOATING_DTYPES,
    check_tensor,
    raise_shape,
)
from himo_kernels.distributed.wire import Members, Rows

_TYPES: tuple[type[Exception], ...] = (ValueError, TypeError, NotImplementedError)
_MESSAGE_BYTES = 1024


def agree(
    operator: str,
    members: Members,
    x: Tensor,
    check: Callable[[], None],
    *,
    settings: object = (),
    needs_grad: tuple[bool, ...] = (),
    check_ranks: bool = True,
) -> Rows:
    """Returns the rows of every rank, if the checks pass on all ranks and their inputs match.

    Args:
        operator: the caller, for error messages.
        x: this rank's features [M, D]; M may be 0 on some ranks, but not on all.
        check: raises if this rank's arguments are wrong.
        settings: what must be equal on every rank, compared by repr.
        needs_grad: for each differentiable input; the backward's collectives depend on it.
        check_ranks: False skips communication and assumes that all ranks have M rows.

    Raises:
        ValueError, TypeError, NotImplementedError: on all ranks, what check raised on any rank,
            with that rank's number; a ValueError if widths, dtypes, gradients or settings differ.
    """
    if members.size == 1 or not check_ranks:
        check()
        return _rows(operator, members, (x.shape[0],) * members.size)
    failure = None
    record = [0, 0, 0, 0, 0, zlib.crc32(repr(settings).encode())]
    try:
        check()
    except _TYPES as error:
        failure = error
        record[0] = 1 + next(i for i, kind in enumerate(_TYPES) if isinstance(error, kind))
    if failure is None:
        bits = sum(1 << index for index, needed in enumerate(needs_grad) if needed)
        record[1:5] = [x.shape[0], x.shape[1], FLOATING_DTYPES.index(x.dtype), bits]
    table = members.all_gather(torch.tensor(record, device=members.table_device)).tolist()
    failed = [rank for rank, row in enumerate(table) if row[0]]
    if failed:
        try:
            _raise_everywhere(members, failed, table, failure)
        finally:
            del failure  # breaks a reference cycle through its frames, which hold the group
    _compare(operator, members, "features of one width", [row[2] for row in table])
    _compare(operator, members, "features of one dtype", [FLOATING_DTYPES[row[3]] for row in table])
    _compare(
        operator, members, "the same inputs to require a gradient", [bin(row[4]) for row in table]
    )
    _compare(operator, members, "the same settings", [f"others ({row[5]:x})" for row in table])
    return _rows(operator, members, tuple(int(row[1]) for row in table))


def check_rows(operator: str, argument: str, x: Tensor) -> None:
    """Raises unless x is a floating-point [M, D] with at least one column; M may be 0."""
    check_tensor(operator, argument, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise_shape(operator, argument, "[M, D] with at least one column", x)


def _rows(operator: str, members: Members, counts: tuple[int, ...]) -> Rows:
    if sum(counts) == 0:
        raise ValueError(f"{operator}: expected at least one row on some rank, got none")
    return Rows(members, counts)


def _compare(operator: str, members: Members, expected: str, values: list[object]) -> None:
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is not None:
        raise ValueError(
            f"{operator}: expected {expected} on every rank, got {values[other]} on rank "
            f"{members.name(other)} and {values[0]} on rank {members.name(0)}"
        )


def _raise_everywhere(
    members: Members,
    failed: list[int],
    table: list[list[int]],
    failure: Exception | None,
) -> NoReturn:
    # Gathers the error messages: a second collective, only on failure.
    text = str(failure).encode()[:_MESSAGE_BYTES] if failure is not None else b""
    padded = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    messages = members.all_gather(padded.to(members.table_device)).cpu()
    first = failed[0]
    words = bytes(messages[first].tolist()).rstrip(b"\0").decode(errors="replace")
    more = f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
    kind = _TYPES[table[first][0] - 1]
    raise kind(f"rank {members.name(first)}: {words}{more}")
