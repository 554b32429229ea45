"""How numbers are held: the dtype of sums, and settings that reach an operator as tensors."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over features of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_tensor(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns number as a tensor []: what an operator takes of a setting that may change.

    A compiler makes one graph for all values of a product, and one for each of torch.full's.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * number
    return torch.full((), number, dtype=dtype, device=device)
