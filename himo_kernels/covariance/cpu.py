"""The `cpu` backend of covariance and gram: csrc/covariance.cpp, for any strides.

Same formula as the reference with less work and memory. Blocks are centred one at a time, which
avoids an [N, D] copy of x in dtype. If the product is wider than 48, only one triangle of it is
computed. Results are exactly symmetric.
"""

import torch
from torch import Tensor

from himo_kernels import extension


def suits_covariance(x: Tensor, *_: Tensor) -> bool:
    """Returns whether covariance is faster here than on the reference."""
    return _suits(x, x.shape[-1])


def suits_gram(x: Tensor, *_: Tensor) -> bool:
    """Returns whether gram is faster here than on the reference."""
    return _suits(x, x.shape[-2])


def _suits(x: Tensor, side: int) -> bool:
    # For smaller inputs exact symmetry costs more than half a product saves: the forward of the
    # reference is up to 1.4 times as fast at N = 8, and 1.2 times with a batch of 32 x 64.
    return side >= 96 and x.shape[-2] * x.shape[-1] >= 2**14


def covariance_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and covariance [*, D, D], in dtype."""
    return extension.load().covariance_fwd(x, dtype)


def covariance_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_covariance: Tensor,  # [*, D, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D], computed in the dtype of mean."""
    return extension.load().covariance_bwd(grad_mean, grad_covariance, x, mean)


def gram_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and gram [*, N, N], in dtype."""
    return extension.load().gram_fwd(x, dtype)


def gram_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_gram: Tensor,  # [*, N, N]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D], computed in the dtype of mean."""
    return extension.load().gram_bwd(grad_mean, grad_gram, x, mean)
