"""covariance and gram: the two sides of one centred second moment."""

import torch
from torch import Tensor

from himo_kernels._checks import check_features, check_finite_values, check_flag, raise_type
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.covariance.op import COVARIANCE, GRAM, CentredMoment
from himo_kernels.dispatch import apply_function


def covariance(
    x: Tensor,  # [*, N, D]
    *,
    dtype: torch.dtype | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean and centred second moment of the features, the D x D side of an in-batch PCA.

    Equal to `X = x.to(dtype) - x.to(dtype).mean(-2, keepdim=True); X.mT @ X`. Differs from
    `torch.cov(x.T)` by the factor N - 1. Without it the nonzero eigenvalues of covariance and gram
    are both the squared singular values of X, and N = 1 gives zeros instead of 0 / 0.

    Args:
        x: Samples in rows, [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        dtype: Dtype of the sums and the result, float32 or float64. Default: float64 for float64
            input, otherwise float32. Use float64 for a PCA (HiDe loses half its digits otherwise).
        check_finite: Raise on NaN or inf in x (syncs with the device) instead of returning NaN.
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Returns:
        mean [*, D] and covariance [*, D, D], in dtype. First-order differentiable in x.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take x.
    """
    dtype = _check("covariance", x, dtype, check_finite)
    return apply_function(CentredMoment, x, "covariance", dtype, COVARIANCE.resolve(backend, x))


def gram(
    x: Tensor,  # [*, N, D]
    *,
    dtype: torch.dtype | None = None,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean and centred inner products of the samples, the N x N side of an in-batch PCA.

    Equal to `X = x.to(dtype) - x.to(dtype).mean(-2, keepdim=True); X @ X.mT`. Smaller than
    covariance if N < D. Arguments and errors as in `covariance`.

    Returns:
        mean [*, D] and gram [*, N, N], in dtype. First-order differentiable in x.
    """
    dtype = _check("gram", x, dtype, check_finite)
    return apply_function(CentredMoment, x, "gram", dtype, GRAM.resolve(backend, x))


def _check(operator: str, x: Tensor, dtype: torch.dtype | None, check_finite: bool) -> torch.dtype:
    check_features(operator, "x", x)
    if dtype is None:
        dtype = accumulation_dtype(x.dtype)
    elif dtype not in (torch.float32, torch.float64):
        raise_type(operator, "dtype", "to be None, torch.float32 or torch.float64", dtype)
    if check_flag(operator, "check_finite", check_finite):
        check_finite_values(operator, x=x)
    return dtype
