"""The specification of normalize: plain PyTorch, any float dtype.

Equation numbers are those of README.md.
"""

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype


def normalize_fwd(
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the rows divided by their length [*, N, D]."""
    largest, _, unit = _directions(features)
    return torch.where(largest == 0, 0.0, unit).to(features.dtype)


def normalize_bwd(
    grad: Tensor,  # [*, N, D]
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the gradient of the features [*, N, D]."""
    largest, length, unit = _directions(features)
    grad = grad.to(unit.dtype)
    across = grad - unit * (grad * unit).sum(-1, keepdim=True)
    return torch.where(largest == 0, 0.0, across / length / largest).to(features.dtype)  # (3)


def _directions(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Of each row its largest entry s [*, N, 1], |u| [*, N, 1] and y [*, N, D], which is NaN for a
    # row of zeros: the callers leave that out.
    wide = features.to(accumulation_dtype(features.dtype))
    largest = wide.abs().amax(-1, keepdim=True)
    scaled = wide / largest  # (1)
    length = scaled.square().sum(-1, keepdim=True).sqrt()
    return largest, length, scaled / length  # (2)
