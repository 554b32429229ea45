"""The specification of normalize: plain PyTorch, any float dtype.

Equation numbers refer to README.md.
"""

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype


def normalize_fwd(
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the rows divided by their length [*, N, D]."""
    largest, _, y = _directions(features)
    return torch.where(largest == 0, 0.0, y).to(features.dtype)


def normalize_bwd(
    grad: Tensor,  # [*, N, D]
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the gradient of the features [*, N, D]."""
    largest, length, y = _directions(features)
    grad = grad.to(y.dtype)
    across = grad - y * (grad * y).sum(-1, keepdim=True)
    return torch.where(largest == 0, 0.0, across / length / largest).to(features.dtype)  # (3)


def _directions(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Returns the largest entry s [*, N, 1] of each row, |u| [*, N, 1] and y [*, N, D]. y is NaN for
    # a row of zeros; callers replace it.
    wide = features.to(accumulation_dtype(features.dtype))
    largest = wide.abs().amax(-1, keepdim=True)
    scaled = wide / largest  # (1)
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    return largest, length, scaled / length  # (2)
