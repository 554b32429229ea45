"""The specification of normalize: plain PyTorch, any float dtype.

Equation numbers are those of README.md.
"""

import torch
from torch import Tensor

from himo_kernels._dispatch import accumulation_dtype


def normalize_fwd(
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the rows divided by their length [*, N, D]."""
    largest, scaled, length = _scaled(features)
    unit = scaled / length  # (2)
    return torch.where(largest == 0, 0.0, unit).to(features.dtype)


def normalize_bwd(
    grad: Tensor,  # [*, N, D]
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the gradient of the features [*, N, D]."""
    largest, scaled, length = _scaled(features)
    unit = scaled / length
    grad = grad.to(unit.dtype)
    across = grad - unit * (grad * unit).sum(-1, keepdim=True)
    return torch.where(largest == 0, 0.0, across / length / largest).to(features.dtype)  # (3)


def _scaled(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Of each row the largest entry [*, N, 1], the row divided by it [*, N, D], the length of that.
    wide = features.to(accumulation_dtype(features.dtype))
    largest = wide.abs().amax(-1, keepdim=True)
    scaled = wide / largest  # (1); NaN for a row of zeros, which is left out at the end
    return largest, scaled, scaled.square().sum(-1, keepdim=True).sqrt()
