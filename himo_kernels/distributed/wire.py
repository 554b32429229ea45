"""The collectives of this package, each counted, on the members of a group and on their rows.

Every rank of a group calls the same collectives in the same order. Bytes are what one rank sends
with the ring algorithms of NCCL and gloo; tests compare them with the cost model of README.md.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank sent: calls and bytes, by kind of collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Yields a Traffic that counts the collectives of this package while the body runs."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def _count(kind: str, sent: float) -> None:
    for traffic in _counting:
        traffic.calls[kind] += 1
        traffic.bytes[kind] += round(sent)


@dataclass(frozen=True)
class Members:
    """A process group and this process's rank in it; one rank if there is no group.

    The default group is stored as None, since the object must not outlive destroy_process_group:
    autograd graphs and frames of an exception keep references to it, and gloo aborts a process
    that still holds its group when the interpreter exits.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @property
    def table_device(self) -> torch.device:
        """The device of small tables for the host: NCCL cannot send CPU memory."""
        return torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")

    def name(self, rank: int) -> int:
        """The global rank of this rank of the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def all_gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shape, stacked: [size, *]."""
        if self.size == 1:
            return x.unsqueeze(0)
        x = x.contiguous()
        gathered = x.new_empty((self.size, *x.shape))
        _count("all_gather", (self.size - 1) * _bytes(x))
        _all_gather(gathered.view(-1), x.view(-1), group=self.group)
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, bitwise equal on each. Overwrites x."""
        if self.size > 1:
            _count("all_reduce", 2 * (self.size - 1) / self.size * _bytes(x))
            dist.all_reduce(x, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """The tensor of rank 0 of the group. Overwrites x."""
        if self.size > 1:
            _count("broadcast", _bytes(x) if self.rank < self.size - 1 else 0)
            dist.broadcast(x, group_src=0, group=self.group)
        return x


@dataclass(frozen=True)
class Rows:
    """Rows of a batch split over the ranks of a group: rank r owns counts[r], in rank order."""

    members: Members
    counts: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.members.rank

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> int:
        return self.counts[self.rank]

    def first(self, rank: int) -> int:
        """The index of a rank's first row in the joined batch."""
        return sum(self.counts[:rank])

    def all_gather(self, x: Tensor) -> Tensor:
        """The rows of all ranks in one buffer: [own, *] -> [total, *]."""
        longest = max(self.counts)
        if self.own < longest:  # gloo and NCCL gather equal shapes only: pad
            padding = x.new_zeros((longest - self.own, *x.shape[1:]))
            x = torch.cat([x, padding])
        gathered = self.members.all_gather(x)  # [size, longest, *]
        if min(self.counts) == longest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(gathered, self.counts, strict=True)])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sums each row over ranks and returns own rows: [total, *] -> [own, *]."""
        members, longest = self.members, max(self.counts)
        if members.size == 1:
            return x
        own = x.new_empty((longest, *x.shape[1:]))
        if min(self.counts) < longest:
            padded = x.new_zeros((members.size, *own.shape))
            for part, rows in zip(padded, x.split(self.counts), strict=True):
                part[: rows.shape[0]] = rows
            x = padded
        _count("reduce_scatter", (members.size - 1) * _bytes(own))
        _reduce_scatter(own.view(-1), x.contiguous().view(-1), group=members.group)
        return own[: self.own]

    def exchange(self, x: Tensor) -> Tensor:
        """Every rank's part for own rows, an all-to-all: [total, *] -> [size, own, *]."""
        members = self.members
        if members.size == 1:
            return x.unsqueeze(0)
        received = x.new_empty((members.size * self.own, *x.shape[1:]))
        _count("all_to_all", _bytes(x) * (1 - self.own / self.total))
        dist.all_to_all_single(
            received,
            x.contiguous(),
            [self.own] * members.size,
            list(self.counts),
            group=members.group,
        )
        return received.view(members.size, self.own, *x.shape[1:])

    def shift(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> "Transfer":
        """Starts sending tensors to the next rank and receiving others from the previous rank.

        Each pair is the tensor to send and the tensor to receive into. All are sent in one group of
        calls, which NCCL launches together. Every rank must pass the same names in the same order.
        """
        members, group = self.members, self.members.group
        following = members.name((self.rank + 1) % members.size)
        preceding = members.name((self.rank - 1) % members.size)
        operations = []
        for tag, (sent, received) in enumerate(pairs.values()):
            if sent.numel():  # both ends know the row counts, so neither waits for an empty tensor
                _count("send", _bytes(sent))
                operations.append(dist.P2POp(dist.isend, sent, following, group, tag))
            if received.numel():
                operations.append(dist.P2POp(dist.irecv, received, preceding, group, tag))
        requests = dist.batch_isend_irecv(operations) if operations else []
        return Transfer(requests, pairs)


class Transfer:
    """A shift in progress; holds its tensors until it completes."""

    def __init__(self, requests: Sequence[Any], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._requests, self._pairs = requests, pairs
        self._received = {name: received for name, (_, received) in pairs.items()}

    def wait(self) -> dict[str, Tensor]:
        """Returns the received tensors; the sent ones may then be overwritten."""
        for request in self._requests:
            request.wait()
        self._requests, self._pairs = (), {}
        return self._received


def members_of(group: dist.ProcessGroup | None, operator: str) -> Members:
    """The members of a group. None is the default group, or this process alone without one."""
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError(f"{operator}: expected group None before init_process_group")
        return Members(None, 0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{operator}: expected a group that this process is a member of")
    return Members(group, rank, dist.get_world_size(group))


def _as_bytes(tensor: Tensor) -> Tensor:  # [M, D] -> uint8 [M, D * itemsize]
    if tensor.shape[0] == 0:  # any stride counts as contiguous, and not every one has a view
        return tensor.new_empty(0, tensor.shape[1] * tensor.element_size(), dtype=torch.uint8)
    return tensor.contiguous().view(torch.uint8)


def pack_rows(*tensors: Tensor) -> Tensor:  # [M, C_i] of any dtypes -> uint8 [M, bytes]
    """One buffer of bytes, to send tensors of several dtypes together."""
    return torch.cat([_as_bytes(tensor) for tensor in tensors], dim=1)


def unpack_rows(buffer: Tensor, *like: Tensor) -> list[Tensor]:
    """The tensors that pack_rows joined; like gives their dtypes and column counts."""
    widths = [tensor.shape[1] * tensor.element_size() for tensor in like]
    parts = buffer.split(widths, dim=1)
    return [
        # Copied even if contiguous: a view of another dtype must be aligned. It cannot be made of
        # no columns.
        part.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
        if tensor.shape[1]
        else tensor.new_empty(part.shape)
        for part, tensor in zip(parts, like, strict=True)
    ]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# torch 2.13 renames both and deprecates the old names; 2.11 and 2.12 have only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
