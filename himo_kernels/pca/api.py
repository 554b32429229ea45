"""pca, project_reconstruct and pca_reconstruct: HiDe's in-batch PCA (HiMo-CLIP section 3.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from himo_kernels._checks import (
    check_device,
    check_features,
    check_finite_values,
    check_flag,
    check_gap_eps,
    check_rank,
    check_shape,
    check_tensor,
    check_variance_floor,
    check_variance_threshold,
    raise_shape,
    raise_type,
)
from himo_kernels._numerics import accumulation_dtype, as_tensor
from himo_kernels.dispatch import apply_function
from himo_kernels.pca.op import (
    PCA_OP,
    PCA_RECONSTRUCT,
    PROJECT_RECONSTRUCT,
    Decompose,
    PCAReconstruct,
    ProjectReconstruct,
)
from himo_kernels.pca.reference import floor_of


class PCA(NamedTuple):
    """A principal component analysis of N samples with D features; n = min(N, D).

    float32, or float64 for float64 input; rank is int64 and stays on the device.
    """

    mean: Tensor  # [*, D]
    eigenvalues: Tensor  # [*, n], of X^T X, descending: squared singular values of X
    components: Tensor  # [*, n, D], orthonormal rows; rows at and past rank are zero
    rank: Tensor  # [*], smallest number of components that reaches the variance threshold
    explained_variance_ratio: Tensor  # [*, n], eigenvalues / trace; 0 where there is no variance


def pca(
    x: Tensor,  # [*, N, D]
    variance_threshold: float = 0.9,
    *,
    variance_floor: float | str = "relative",
    gap_eps: float = 1e-6,
    check_finite: bool = False,
    backend: str = "auto",
) -> PCA:
    """PCA of the rows of x, cut at a cumulative share of the variance.

    The rank is the smallest r with `eigenvalues[:r].sum() / eigenvalues.sum() >= tau`, chosen from
    float64 eigenvalues. Output shapes depend only on the shape of x. scikit-learn's
    `PCA(n_components=tau)` differs only at a share of exactly tau: it requires a share > tau and
    keeps one more component.

    A batch without variance (one row, or equal rows; see variance_floor) has rank n. If N < D,
    components without variance are zero: a projection onto them gives the mean, unlike
    pca_reconstruct, which returns x.

    Mean, eigenvalues and explained_variance_ratio are differentiable to first order. So are
    components as a subspace: the gradient is exact for every function that does not change when the
    kept components are rotated among themselves (projections, reconstructions), and never divides
    by a difference of kept eigenvalues. The gradient of a single eigenvector is not provided.

    Args:
        x: Samples in rows, [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        variance_threshold: tau in (0, 1].
        variance_floor: A batch has no variance if the sum of its eigenvalues (the squared distances
            of the rows from their mean) is at or below this number, >= 0. "relative" means
            `(8 eps)^2 * (x**2).sum()` with the eps of x's dtype: the rank then does not depend on
            the scale of x.
        gap_eps: Relative floor of the eigenvalue gap at the cut in the backward; see
            pca_reconstruct.
        check_finite: Raise on NaN or inf in x (syncs with the device) instead of returning NaN.
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take x.
    """
    floor = _check("pca", x, variance_threshold, variance_floor, check_finite)
    gap_eps = check_gap_eps("pca", gap_eps)
    backend = PCA_OP.resolve(backend, x)
    threshold = as_tensor(float(variance_threshold), torch.float64, x.device)
    return PCA(*apply_function(Decompose, x, threshold, floor, gap_eps, backend))


def project_reconstruct(
    x: Tensor,  # [*, M, D]
    pca: PCA,
    *,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """x projected onto the kept components and reconstructed, [*, M, D] in x's dtype.

    Equal to `(x - mean) @ P.mT @ P + mean` with P the first rank rows of components. x need not be
    the batch that the PCA was computed from. Differentiable to first order in x, mean and
    components.

    Args:
        x: Samples in rows, [*, M, D]; same leading dimensions, D and device as the PCA.
        pca: Result of `pca` for features of x's dtype. `pca._replace(rank=...)` keeps fewer
            components.
        check_finite: Raise on NaN or inf in x or in pca (syncs with the device).
        backend: As in `pca`.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take x.
    """
    operator = "project_reconstruct"
    check_features(operator, "x", x, "[*, M, D]")
    if not isinstance(pca, PCA):
        raise_type(operator, "pca", "to be what himo_kernels.pca returned", type(pca).__name__)
    *batch, _, features = x.shape
    for name in ("mean", "components"):
        value = getattr(pca, name)
        check_tensor(operator, f"pca.{name}", value)
        if value.dtype != accumulation_dtype(x.dtype):
            expected = f"of dtype {accumulation_dtype(x.dtype)} for x of dtype {x.dtype}"
            raise_type(operator, f"pca.{name}", expected, value.dtype)
        check_device(operator, f"pca.{name}", value, "x", x)
    check_shape(operator, "pca.mean", pca.mean, (*batch, features))
    components = pca.components
    if components.dim() != x.dim() or components.shape[:-2] != x.shape[:-2]:
        raise_shape(operator, "pca.components", str([*batch, "K", features]), components)
    check_shape(operator, "pca.components", components, (*components.shape[:-1], features))
    check_rank(operator, "pca.rank", pca.rank, batch, x)
    if check_flag(operator, "check_finite", check_finite):
        parts = {"pca.mean": pca.mean, "pca.components": pca.components}
        check_finite_values(operator, x=x, **parts)
    backend = PROJECT_RECONSTRUCT.resolve(backend, x)
    return apply_function(ProjectReconstruct, x, pca.mean, pca.components, pca.rank, backend)


def pca_reconstruct(
    x: Tensor,  # [*, N, D]
    variance_threshold: float = 0.9,
    *,
    variance_floor: float | str = "relative",
    gap_eps: float = 1e-6,
    differentiate_basis: bool = True,
    check_finite: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """HiDe: x reconstructed from the leading principal components of its own batch, eq. (1).

    Equal to `project_reconstruct(x, pca(x, tau))` in one operator, decomposed in float64. Rows may
    be up to 1e150 in length; beyond that squares overflow and the result is NaN. Values and
    gradients are finite for equal rows, rank-deficient batches and equal eigenvalues. The operator
    is the identity if rank = n or the batch has no variance (N = 1, equal rows; see
    variance_floor).

    Args:
        x: Text features in rows, [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
            Leading dimensions are independent problems: `x.view(8, 128, D)` gives what 8 ranks with
            a local PCA each compute.
        variance_threshold: tau in (0, 1], as in `pca`.
        variance_floor: As in `pca`.
        gap_eps: The backward divides by the gap delta between kept and dropped eigenvalues. It uses
            delta / (delta^2 + (gap_eps lambda_R)^2) instead of 1 / delta, which bounds the norm of
            the gradient by (3 + 1 / gap_eps) times the incoming one. 0 gives the exact derivative.
        differentiate_basis: False treats the projector as a constant (an ablation that drops the
            gradient through the basis).
        check_finite: Raise on NaN or inf in x (syncs with the device) instead of returning NaN.
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Returns:
        reconstruction [*, N, D] in x's dtype and rank [*], int64, on the device.
        Differentiable to first order in x.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take x.
    """
    operator = "pca_reconstruct"
    floor = _check(operator, x, variance_threshold, variance_floor, check_finite)
    gap_eps = check_gap_eps(operator, gap_eps)
    check_flag(operator, "differentiate_basis", differentiate_basis)
    return reconstruct_above(floor, x, variance_threshold, gap_eps, differentiate_basis, backend)


def reconstruct_above(
    floor: tuple[float, float],  # from floor_of
    x: Tensor,  # [*, N, D]
    variance_threshold: float,
    gap_eps: float,
    differentiate_basis: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """pca_reconstruct with checked arguments and a given floor, independent of x's dtype."""
    backend = PCA_RECONSTRUCT.resolve(backend, x)
    threshold = as_tensor(float(variance_threshold), torch.float64, x.device)
    return apply_function(
        PCAReconstruct, x, threshold, floor, gap_eps, differentiate_basis, backend
    )


def _check(
    operator: str,
    x: Tensor,
    variance_threshold: float,
    variance_floor: float | str,
    check_finite: bool,
) -> tuple[float, float]:
    # Returns the floor as the backends expect it: (f, g) of floor_of.
    check_features(operator, "x", x)
    check_variance_threshold(operator, variance_threshold)
    floor = floor_of(x.dtype, check_variance_floor(operator, variance_floor))
    if check_flag(operator, "check_finite", check_finite):
        check_finite_values(operator, x=x)
    return floor
