"""The `triton` backend of covariance and gram, for any strides. Not yet run on hardware.

The mean is one reduction and the moment one product, which subtracts the mean as it loads x. A
product with few tiles is split along its inner dimension, and the parts are added in a fixed order:
without atomics, results are bitwise equal from run to run.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.covariance.triton.matmul import flat, matmul


def covariance_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and covariance [*, D, D], in dtype."""
    mean = x.mean(-2, dtype=dtype)
    moment = feature_moment(flat(x), flat(mean, 1))
    return mean, moment.view(*x.shape[:-2], *moment.shape[1:])


def covariance_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_covariance: Tensor,  # [*, D, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D], computed in the dtype of mean."""
    x_flat, mean = flat(x), flat(mean, 1)
    grads = flat(grad_covariance + grad_covariance.mT)
    # The columns of X, and so of X (G + G^T), sum to 0. Only the mean's gradient is added.
    add = flat(grad_mean, 1).unsqueeze(-2) / x.shape[-2]
    out = x.new_empty(x_flat.shape)
    matmul(x_flat, grads, mean.dtype, mean=mean, a_mean="inner", add=add, out=out)
    return out.view(x.shape)


def gram_fwd(
    x: Tensor,  # [*, N, D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns mean [*, D] and gram [*, N, N], in dtype."""
    mean = x.mean(-2, dtype=dtype)
    moment = sample_moment(flat(x), flat(mean, 1))
    return mean, moment.view(*x.shape[:-2], *moment.shape[1:])


def gram_bwd(
    grad_mean: Tensor,  # [*, D]
    grad_gram: Tensor,  # [*, N, N]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
) -> Tensor:
    """Returns the gradient of x [*, N, D], computed in the dtype of mean."""
    x_flat, mean = flat(x), flat(mean, 1)
    grads = flat(grad_gram + grad_gram.mT)
    grads = grads - grads.mean(-2, keepdim=True)  # subtracts the mean of dX over the samples
    add = flat(grad_mean, 1).unsqueeze(-2) / x.shape[-2]
    out = x.new_empty(x_flat.shape)
    matmul(grads, x_flat, mean.dtype, mean=mean, b_mean="columns", add=add, out=out)
    return out.view(x.shape)


def feature_moment(
    x: Tensor,  # [P, N, D]
    mean: Tensor,  # [P, D]
) -> Tensor:
    """Returns X^T X [P, D, D], X = x - mean, in the dtype of mean."""
    return matmul(x.mT, x, mean.dtype, mean=mean, a_mean="rows", b_mean="columns", symmetric=True)


def sample_moment(
    x: Tensor,  # [P, N, D]
    mean: Tensor,  # [P, D]
) -> Tensor:
    """Returns X X^T [P, N, N], X = x - mean, in the dtype of mean."""
    return matmul(x, x.mT, mean.dtype, mean=mean, a_mean="inner", b_mean="inner", symmetric=True)


def aot_cases() -> Iterator[Case]:
    """The launches that himo_kernels.aot compiles."""
    for dtype in (torch.bfloat16, torch.float32):
        for sums in (torch.float32, torch.float64):
            label = f"covariance and gram, {dtype} sums in {sums}".replace("torch.", "")
            yield Case(label, partial(_launch_all, (4, 1024, 768), dtype, sums))
            ragged = partial(_launch_all, (3, 500, 507), dtype, sums)
            yield Case(f"{label}, ragged", ragged, ragged=True)


def _launch_all(shape: tuple[int, ...], dtype: torch.dtype, sums: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    for fwd, bwd in ((covariance_fwd, covariance_bwd), (gram_fwd, gram_bwd)):
        mean, moment = fwd(x, sums)
        bwd(mean, moment, x, mean)
