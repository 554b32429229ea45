"""The dtype of sums, and settings passed to an operator as tensors."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums over features of this dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_tensor(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns number as a tensor [], the form in which operators take a setting that may change.

    torch.compile specialises on the value in torch.full, but makes one graph for all factors of a
    product.
    """
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * number
    return torch.full((), number, dtype=dtype, device=device)
