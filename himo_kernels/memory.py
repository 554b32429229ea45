"""How much memory an operator may cache between its passes."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype

# cgroup v2: the limit and the use of a container, both in bytes.
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping; 0 if the system does not say.

    The minimum of Linux's MemAvailable and the rest of a container's limit.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
        kib = meminfo.partition("MemAvailable:")[2].split(maxsplit=1)[0]
        available = int(kib) << 10
    except (OSError, ValueError, IndexError):
        return 0
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        # Cached files count as used, but the system drops them for an allocation.
        files = (_CGROUP / "memory.stat").read_text().partition("inactive_file ")[2]
        used -= int(files.split(maxsplit=1)[0])
    except (OSError, ValueError, IndexError):  # no container, or one without a limit ("max")
        return available
    return min(available, max(0, limit - used))


# By default a cache may take a quarter of the available memory, at most _MOST. Up to SMALL the
# system is not asked, because that takes 30 us.
SMALL, _MOST = 16 << 20, 1 << 30
# A compiled graph cannot ask the system. It uses the value at import.
_available_at_import = available_memory()


def fits(size: int, budget: float | None) -> bool:
    """Returns whether a cache of this many bytes fits the budget. None means the default."""
    if budget is not None:
        return size <= budget
    if size <= SMALL:
        return True
    if torch.compiler.is_compiling():
        available = _available_at_import
    else:
        available = available_memory()
    return size <= min(_MOST, available // 4)


def cache_for(
    features: Tensor, shape: Sequence[int], budget: float | None, *, count: int = 1
) -> Tensor | None:
    """Returns an empty cache of this shape, in the dtype of sums over features.

    None if `count` caches of this size do not fit the budget together.
    """
    dtype = accumulation_dtype(features.dtype)
    if not fits(count * math.prod(shape) * dtype.itemsize, budget):
        return None
    return features.new_empty(shape, dtype=dtype)
