"""Peak memory that one call uses beyond its inputs.

On a GPU it is the caching allocator's peak. On a CPU it is the growth of the resident size in a
process forked for this one call: VmHWM of /proc/self/status after a reset through
/proc/self/clear_refs. It includes all memory that the call touches, such as C++ and BLAS buffers.
Linux updates the counts in steps of 64 pages per thread: ignore differences below 1 MiB.
"""

import ctypes
import gc
import json
import math
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20
M_MMAP_THRESHOLD, RETURNED = -3, 128 << 10  # of glibc's mallopt, and its first value in bytes
OUT_OF_MEMORY = "out of memory"
LEFT_OUT = "left out"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_cuda(run: Callable[[], object]) -> float:
    """MiB above the allocation before the call, including its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return (peak - before) / MIB


def in_child(work: Callable[[], object], seconds: float = math.inf) -> object:
    """Runs work in a forked process and returns its result via JSON; {"reason": ...} on failure.

    After `seconds` the child is ended and the reason begins with LEFT_OUT. The parent must not have
    computed anything before: that would start threads, which a child waits for but does not have.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if seconds < math.inf:  # SIGALRM ends it even inside a matmul
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the parent may have a handler
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
            limit_to_free_memory()
            answer = work()
        except Exception as error:  # the row says what happened
            answer = {"reason": reason(error)}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if ended_by == signal.SIGALRM:
        return {"reason": f"{LEFT_OUT}: over {seconds:.3g} s"}
    killed = ended_by == signal.SIGKILL
    return {"reason": OUT_OF_MEMORY if killed else f"died with status {status}"}


def reason(error: Exception) -> str:
    """The reason that a row gives for an error: out of memory, or its first line."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    # torch's CPU allocator raises a plain RuntimeError.
    signs = ("not enough memory", "can't allocate memory", "std::bad_alloc", "OutOfMemoryError")
    if isinstance(error, MemoryError) or any(sign in text for sign in signs):
        return OUT_OF_MEMORY
    return text


def limit_to_free_memory() -> None:
    """Limits this process to the free memory, so that it gets an error instead of a kill."""
    available = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) << 10
    size = int(re.search(r"VmSize:\s*(\d+)", _STATUS.read_text())[1]) << 10
    limit = size + int(0.9 * available)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def return_freed_blocks() -> None:
    """Makes glibc return each freed block of 128 KiB and more to the system, in this process.

    By default it raises that size with each freed block, up to 32 MiB. A peak would then include
    free blocks, and be lower for a call whose warm-up left such blocks.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, RETURNED)


def peak_cpu(warm_up: Callable[[], object], run: Callable[[], object]) -> dict[str, float]:
    """{"peak_mib", "time_ms"} of one run. Call it in a child.

    warm_up runs first and is not measured: it loads libraries and starts threads, or compiles.
    """
    warm_up()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns free pages, so that reusing them counts
    _RESET.write_text("5")
    before = _status_kib("VmRSS")
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    peak = _status_kib("VmHWM") - before
    del result
    return {"peak_mib": peak / 1024, "time_ms": elapsed * 1000}


def _status_kib(field: str) -> int:
    return int(re.search(rf"^{field}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)[1])
