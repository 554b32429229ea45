"""The specification of covariance and gram: plain PyTorch, any float dtype.

With X = x - mean:  covariance = X^T X,  gram = X X^T  (semantics: HiMo-CLIP section 3.2).
"""

import torch
from torch import Tensor


def covariance_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and covariance [*, D, D], both summed and stored in dtype."""
    mean, centred = _centre(x, dtype)
    return mean, centred.mT @ centred


def covariance_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_covariance: Tensor,  # [*, D, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D]: dX = X (G + G^T)."""
    centred = x.to(mean.dtype) - mean.unsqueeze(-2)
    grad_centred = centred @ (grad_covariance + grad_covariance.mT)
    return _uncentre(grad_centred, grad_mean).to(x.dtype)


def gram_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and gram [*, N, N], both summed and stored in dtype."""
    mean, centred = _centre(x, dtype)
    return mean, centred @ centred.mT


def gram_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_gram: Tensor,  # [*, N, N]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D]: dX = (G + G^T) X."""
    centred = x.to(mean.dtype) - mean.unsqueeze(-2)
    grad_centred = (grad_gram + grad_gram.mT) @ centred
    return _uncentre(grad_centred, grad_mean).to(x.dtype)


def _centre(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = x.to(dtype)  # before centring: a subtraction in bfloat16 would lose digits
    mean = x.mean(-2)
    return mean, x - mean.unsqueeze(-2)


def _uncentre(grad_centred: Tensor, grad_mean: Tensor) -> Tensor:
    # X = x - mean, so the mean of dX is subtracted, and grad_mean / N is added to every row.
    samples = grad_centred.shape[-2]
    return grad_centred + (grad_mean / samples - grad_centred.mean(-2)).unsqueeze(-2)
