"""How much memory an operator may keep between its passes."""

from pathlib import Path

import torch

# cgroup v2: the limit of a container and what it uses, both in bytes.
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Returns bytes that can be allocated without swapping; 0 where the system does not say.

    The smaller of what Linux calls MemAvailable and of what a container's limit leaves.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
        kib = meminfo.partition("MemAvailable:")[2].split(maxsplit=1)[0]
        available = int(kib) << 10
    except (OSError, ValueError, IndexError):
        return 0
    try:
        limit, used = (
            int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return available
    return min(available, max(0, limit - used))


# By default what is kept may take a quarter of the available memory and 1 GiB at most. Up to _SMALL
# nobody is asked: that takes 30 us.
_SMALL, _MOST = 16 << 20, 1 << 30
# A compiled graph cannot ask the system, and takes what was available at import.
_available_at_import = available_memory()


def fits(size: int, budget: float | None) -> bool:
    """Returns whether this many bytes may be kept. budget: in bytes, or None for the default."""
    if budget is not None:
        return size <= budget
    if size <= _SMALL:
        return True
    if torch.compiler.is_compiling():
        available = _available_at_import
    else:
        available = available_memory()
    return size <= min(_MOST, available // 4)
