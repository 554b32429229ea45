"""Tensors between known values, which reveal reads and writes out of bounds."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

_PAD = 4096  # entries on either side, more than a tile can overrun
_CANARY = 1.2345678e30


def between_nan(tensor: Tensor) -> Tensor:
    """A copy with NaN around it, which reads out of bounds carry into the results."""
    storage = tensor.new_full((tensor.numel() + 2 * _PAD,), math.nan)
    return storage[_PAD : storage.numel() - _PAD].view(tensor.shape).copy_(tensor)


@contextmanager
def guarded_allocations(least: int) -> Iterator[None]:
    """Fails unless the block calls torch.empty `least` times and writes nothing out of bounds.

    `least` is there because a kernel that allocates in another way is not guarded.
    """
    guarded: list[Tensor] = []
    empty = torch.empty

    def guard(*size: object, **options: object) -> Tensor:
        tensor = empty(*size, **options)
        storage = empty(tensor.numel() + 2 * _PAD, **options).fill_(_CANARY)
        guarded.append(storage)
        return storage[_PAD : storage.numel() - _PAD].view(tensor.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", guard)
        yield
    assert len(guarded) >= least
    for storage in guarded:
        for edge in (storage[:_PAD], storage[-_PAD:]):
            assert (edge == torch.tensor(_CANARY).to(edge)).all()
