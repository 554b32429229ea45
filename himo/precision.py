"""Chooses the dtype of the towers' matmuls on a device."""

import functools
import time
from collections.abc import Callable
from typing import Literal

import torch

from himo.parallel import Ranks

_SIZE = 512  # rows and columns of the timed matmuls, which take milliseconds if they are fast
Chosen = Literal["fp32", "amp", "amp_bf16"]
AUTOCAST = {"amp": torch.float16, "amp_bf16": torch.bfloat16}


def resolve(
    precision: Chosen | Literal["auto"], device: torch.device, ranks: Ranks | None = None
) -> tuple[Chosen, str]:
    """Returns the precision to use, and a line for the user if it is not what was asked for.

    The result is a half precision only if its matmuls are faster than float32's, even where it was
    asked for: an x86 processor without AVX-512 BF16 or AMX takes up to a hundred times as long in
    bfloat16. "auto" takes bfloat16, which needs no scaled loss. One slow rank decides for all.
    """
    if precision == "fp32":
        return precision, ""
    half: Chosen = "amp_bf16" if precision == "auto" else precision
    slower = not is_faster_than_float32(AUTOCAST[half], device.type)
    if ranks is not None:
        slower = ranks.any(slower)()
    if slower:
        name = str(AUTOCAST[half]).removeprefix("torch.")
        why = f"{name} products are slower than float32 on this {_kind(device)}"
        return "fp32", f"precision fp32: {why}"
    return half, f"precision {half}" if precision == "auto" else ""


def products_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype to compute matmuls in: dtype, or float32 where a half is not faster."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and not is_faster_than_float32(dtype, device.type) else dtype


@functools.cache
def is_faster_than_float32(dtype: torch.dtype, device: str) -> bool:
    """Returns whether a training step's matmuls are faster in a half-precision dtype.

    A CPU is timed once a process, because no flag of torch tells processors that compute in
    bfloat16 from those that emulate it. A GPU's capability tells.
    """
    if device != "cpu":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    # By a quarter at least, so that every process on a processor gets the same answer.
    return 1.25 * _products_s(dtype) < _products_s(torch.float32)


def _products_s(dtype: torch.dtype) -> float:
    # The three matmuls of a linear layer: its forward, and the gradients of input and weight.
    left, right = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    layouts = (lambda: left @ right.T, lambda: left @ right, lambda: left.T @ right)
    return sum(min(_seconds(layout) for _ in range(3)) for layout in layouts)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _kind(device: torch.device) -> str:
    return "processor" if device.type == "cpu" else "GPU"
