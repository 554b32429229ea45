"""Which dtype the products of the towers run in on this device."""

import functools
import time
from collections.abc import Callable
from typing import Literal

import torch

from himo.parallel import Ranks

_SIZE = 512  # rows and columns of the products that are timed: milliseconds where they are fast


Chosen = Literal["fp32", "amp_bf16"]


def resolve(
    precision: Chosen | Literal["auto"], device: torch.device, ranks: Ranks | None = None
) -> tuple[Chosen, str]:
    """Returns "fp32" or "amp_bf16", and a line that says why where it is not what was asked.

    "auto" is bfloat16 where its products are faster than those of float32. Asked for by name it
    gives way to float32 where they are slower: an x86 processor without AVX-512 BF16 or AMX takes
    up to a hundred times as long. Over ranks the slowest decides for all.
    """
    if precision == "fp32":
        return precision, ""
    slower = not is_faster_than_float32(torch.bfloat16, device.type)
    if ranks.any(slower).result() if ranks is not None else slower:
        why = f"bfloat16 products are slower than float32 on this {_kind(device)}"
        return "fp32", f"precision fp32: {why}"
    return "amp_bf16", "precision amp_bf16" if precision == "auto" else ""


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype for products of weights of a half-precision dtype: float32 if faster."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not is_faster_than_float32(dtype, device.type) else dtype


@functools.cache
def is_faster_than_float32(dtype: torch.dtype, device: str) -> bool:
    """Returns whether a training step's products are faster in a half-precision dtype.

    A CPU is timed, once a process: no flag of torch tells processors that compute in bfloat16 from
    those that emulate it. A GPU has the answer in its capability.
    """
    if device != "cpu":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    # By a quarter at least: the same processor shall answer the same in every process.
    return 1.25 * _products_s(dtype) < _products_s(torch.float32)


def _products_s(dtype: torch.dtype) -> float:
    # The three layouts of a linear layer: its forward, and its gradients of input and weight.
    left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    layouts = (lambda: left @ right.T, lambda: left @ right, lambda: left.T @ right)
    return sum(min(_seconds(layout) for _ in range(3)) for layout in layouts)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _kind(device: torch.device) -> str:
    return "processor" if device.type == "cpu" else "GPU"
