"""How much memory a process may still allocate."""

from pathlib import Path

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
