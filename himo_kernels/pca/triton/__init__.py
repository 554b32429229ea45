"""The `triton` backend of pca, project_reconstruct and pca_reconstruct. Not yet run on hardware.

Products are float64, as in the reference, on float64 tensor cores; project_reconstruct uses the
dtype of its PCA. Kernels after the eigensolver read the rank on the device: loops end at it, and
programs past it return at once. Equation numbers refer to himo_kernels/pca/README.md.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.covariance.triton import feature_moment, sample_moment
from himo_kernels.covariance.triton.matmul import flat, matmul
from himo_kernels.pca.triton.eigensolver import Rule, Solution, solve
from himo_kernels.pca.triton.moment import (
    F64,
    Options,
    finished,
    grad_moment,
    identity,
    moment_bwd,
    moment_decompose,
    moment_grad_projector,
    moment_reconstruct,
)
from himo_kernels.pca.triton.weights import null_weights, weigh_pairs

__all__ = [
    "aot_cases",
    "moment_bwd",
    "moment_decompose",
    "moment_grad_projector",
    "moment_reconstruct",
    "pca_bwd",
    "pca_fwd",
    "pca_reconstruct_bwd",
    "pca_reconstruct_fwd",
    "project_reconstruct_bwd",
    "project_reconstruct_fwd",
]


def pca_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, ...]:
    """Returns mean [*, D], eigenvalues [*, n], components [*, n, D], rank [*], V [*, n, n].

    float64, rank int64. Rows of components at and past rank are zero.
    """
    batch, x = x.shape[:-2], flat(x)
    mean, (eigenvalues, eigenvectors, rank, _) = _decompose(x, variance_threshold, floor)
    present = _present(x, eigenvalues, rank)
    components = _components(x, mean, eigenvalues, eigenvectors, rank, present)
    return _batched(batch, mean, eigenvalues, components, rank, eigenvectors)


def pca_bwd(
    grad_mean: Tensor,  # [*, D] float64
    grad_eigenvalues: Tensor,  # [*, n] float64
    grad_components: Tensor,  # [*, n, D] float64
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D] float64
    eigenvalues: Tensor,  # [*, n] float64
    eigenvectors: Tensor,  # [*, n, n] float64
    rank: Tensor,  # [*] int64
    gap_eps: float,
) -> Tensor:
    """Returns the gradient of x [*, N, D]; equations (8) to (10).

    The columns of X, and so of every term of (10), sum to 0. Only the mean's gradient is added.
    """
    shape, x, mean, rank = x.shape, flat(x), flat(mean, 1), flat(rank, 0)
    eigenvalues, eigenvectors = flat(eigenvalues, 1), flat(eigenvectors)
    present = _present(x, eigenvalues, rank)
    components = _components(x, mean, eigenvalues, eigenvectors, rank, present)
    grads = torch.where(present.unsqueeze(-1), flat(grad_components), 0.0)
    add = flat(grad_mean, 1).unsqueeze(-2) / x.shape[-2]
    scaled = eigenvectors * (2 * flat(grad_eigenvalues, 1).unsqueeze(-2))
    limit: Options = {"limit": rank}
    if _feature_side(x):
        h = matmul(grads, eigenvectors, F64, limited="rows", **limit)
        weigh_pairs(h, eigenvalues, rank, gap_eps)
        h = matmul(h, eigenvectors.mT, F64, limited="rows", **limit)  # eq. (8)
        product = matmul(h.mT, components, F64, limited="inner", **limit)
        moment = matmul(scaled, eigenvectors.mT, F64, add=product + product.mT)
        return finished(shape, x, x, moment, mean=mean, a_mean="inner", add=add)
    centred: Options = {"mean": mean, "b_mean": "columns"}
    last_kept = torch.where(eigenvalues > 0, eigenvalues, 1.0).gather(-1, rank.unsqueeze(-1) - 1)
    root = last_kept.sqrt().unsqueeze(-1)
    axes = matmul(eigenvectors.mT, x, F64, **centred) / root  # a_j / sqrt(lambda_R)
    overlaps = matmul(grads, components.mT, F64)
    outside = matmul(overlaps, components, F64, add=grads, alpha=-1.0)
    corrections = matmul(grads, axes.mT, F64)
    weigh_pairs(corrections, eigenvalues, rank, gap_eps, null=True)
    weights = null_weights(eigenvalues, rank, present, gap_eps)
    # Eq. (9), zero past rank
    h = matmul(corrections, axes, F64, add=weights.unsqueeze(-1) * outside)
    h = torch.where(present.unsqueeze(-1), h, 0.0)
    left = matmul(x, h.mT, F64, mean=mean, a_mean="inner", limited="columns", **limit)
    add = matmul(left, components, F64, limited="inner", add=add, **limit)
    left = matmul(x, components.mT, F64, mean=mean, a_mean="inner", limited="columns", **limit)
    add = matmul(left, h, F64, limited="inner", add=add, **limit)
    return finished(shape, x, scaled * root, axes, add=add)


def project_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> Tensor:
    """Returns (x - mean) P^T P + mean, with P the first rank rows of components."""
    shape, x, mean = x.shape, flat(x), flat(mean, 1)
    components = flat(components)
    limit: Options = {"limit": flat(rank, 0)}
    coefficients = matmul(
        x, components.mT, mean.dtype, mean=mean, a_mean="inner", limited="columns", **limit
    )
    add = mean.unsqueeze(-2)
    return finished(shape, x, coefficients, components, limited="inner", add=add, **limit)


def project_reconstruct_bwd(
    grad_reconstruction: Tensor,  # [*, N, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x [*, N, D], mean [*, D] and components [*, K, D]."""
    shape, components_shape = x.shape, components.shape
    grad, x, mean = flat(grad_reconstruction), flat(x), flat(mean, 1)
    components, sums = flat(components), mean.dtype
    limit: Options = {"limit": flat(rank, 0)}
    coefficients = matmul(
        x, components.mT, sums, mean=mean, a_mean="inner", limited="columns", **limit
    )
    grad_coefficients = matmul(grad, components.mT, sums, limited="columns", **limit)
    grad_x = finished(shape, x, grad_coefficients, components, limited="inner", **limit)
    # The sum of G - G Pi over the samples, computed from the sum of G, one row.
    total = grad.sum(-2, keepdim=True, dtype=sums)
    along = matmul(total, components.mT, sums, limited="columns", **limit)
    grad_mean = total - matmul(along, components, sums, limited="inner", **limit)
    first = matmul(coefficients.mT, grad, sums, limited="rows", **limit)
    grad_components = torch.zeros_like(components, memory_format=torch.contiguous_format)
    rest: Options = {"b_mean": "columns", "add": first, "out": grad_components, **limit}
    matmul(grad_coefficients.mT, x, sums, mean=mean, limited="rows", **rest)
    return grad_x, grad_mean.view(*shape[:-2], shape[-1]), grad_components.view(components_shape)


def pca_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, ...]:
    """Returns U' [*, N, D] in x's dtype, rank [*], mean [*, D], eigenvalues [*, n], V [*, n, n]."""
    shape, x = x.shape, flat(x)
    mean, solution = _decompose(x, variance_threshold, floor)
    eigenvalues, eigenvectors, rank, complete = solution
    limit: Options = {"limit": rank}
    if _feature_side(x):
        left = matmul(x, eigenvectors, F64, mean=mean, a_mean="inner", limited="columns", **limit)
        right = eigenvectors.mT
    else:  # X Pi = W W^T X
        left = eigenvectors
        right = matmul(
            eigenvectors.mT, x, F64, mean=mean, b_mean="columns", limited="rows", **limit
        )
    add = mean.unsqueeze(-2)
    projected = finished(x.shape, x, left, right, limited="inner", add=add, **limit)  # eq. (3)
    reconstruction = torch.where(complete[:, None, None], x, projected).view(shape)
    return reconstruction, *_batched(shape[:-2], rank, mean, eigenvalues, eigenvectors)


def pca_reconstruct_bwd(
    grad_reconstruction: Tensor,  # [*, N, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D] float64
    eigenvalues: Tensor,  # [*, n] float64
    eigenvectors: Tensor,  # [*, n, n] float64
    rank: Tensor,  # [*] int64
    gap_eps: float,
    differentiate_basis: bool,
) -> Tensor:
    """Returns the gradient of x [*, N, D]; equations (4) to (7).

    The mean of dX over the samples is subtracted from the left factor of the last product.
    """
    shape, grad, x, mean = x.shape, flat(grad_reconstruction), flat(x), flat(mean, 1)
    eigenvalues, eigenvectors, rank = flat(eigenvalues, 1), flat(eigenvectors), flat(rank, 0)
    limit: Options = {"limit": rank}
    grad_mean = grad.mean(-2, dtype=F64)
    add = grad_mean.unsqueeze(-2)
    if differentiate_basis and not _feature_side(x):
        # In the eigenbasis, V^T B V = (V^T G) (V^T X)^T and dX = V ((H + H^T) V^T X + K V^T G),
        # where K is 1 for kept and 0 for dropped directions.
        basis_grad = matmul(eigenvectors.mT, grad, F64)
        basis_x = matmul(eigenvectors.mT, x, F64, mean=mean, b_mean="columns")
        pairs = matmul(basis_grad, basis_x.mT, F64)
        weigh_pairs(pairs, eigenvalues, rank, gap_eps, symmetric=True)
        basis_grad_x = matmul(pairs, basis_x, F64, limited="add", add=basis_grad, **limit)
        centred: Options = {"mean": eigenvectors.mean(-2), "a_mean": "inner"}
        return finished(shape, x, eigenvectors, basis_grad_x, add=add, **centred)  # eq. (7)
    centred_grad: Options = {"mean": grad_mean, "a_mean": "inner", "limited": "columns", **limit}
    if not differentiate_basis:
        present = _present(x, eigenvalues, rank)
        components = _components(x, mean, eigenvalues, eigenvectors, rank, present)
        left = matmul(grad, components.mT, F64, **centred_grad)
        grad_x = finished(x.shape, x, left, components, limited="inner", add=add, **limit)
        return torch.where(identity(eigenvalues, rank), grad, grad_x).view(shape)
    grad_projector = matmul(x.mT, grad, F64, mean=mean, a_mean="rows")  # B, eq. (4)
    symmetric = grad_projector + grad_projector.mT
    grad_c = grad_moment(symmetric, eigenvalues, eigenvectors, rank, gap_eps)  # dC
    add = matmul(x, grad_c, F64, mean=mean, a_mean="inner", add=add)
    left, right = matmul(grad, eigenvectors, F64, **centred_grad), eigenvectors.mT
    return finished(shape, x, left, right, limited="inner", add=add, **limit)  # eq. (7)


def _feature_side(x: Tensor) -> bool:
    return x.shape[-1] <= x.shape[-2]  # D <= N: the D x D side is the smaller one


def _decompose(
    x: Tensor, variance_threshold: Tensor, floor: Sequence[float]
) -> tuple[Tensor, Solution]:
    mean = x.mean(-2, dtype=F64)
    moment = feature_moment(x, mean) if _feature_side(x) else sample_moment(x, mean)
    return mean, solve(moment, Rule(variance_threshold, floor, mean, x.shape[-2]))


def _components(
    x: Tensor,
    mean: Tensor,
    eigenvalues: Tensor,
    eigenvectors: Tensor,
    rank: Tensor,
    present: Tensor,  # from _present
) -> Tensor:
    # Components [P, n, D] of P problems: kept eigenvectors of X^T X as rows, zero past rank.
    if _feature_side(x):
        return torch.where(present.unsqueeze(-1), eigenvectors.mT, 0.0)
    inverse_norms = torch.where(present, eigenvalues, torch.inf).rsqrt().unsqueeze(-2)
    components = x.new_zeros((*eigenvalues.shape, x.shape[-1]), dtype=F64)
    rows = (eigenvectors * inverse_norms).mT
    return matmul(
        rows, x, F64, mean=mean, b_mean="columns", limited="rows", limit=rank, out=components
    )


def _present(x: Tensor, eigenvalues: Tensor, rank: Tensor) -> Tensor:
    # Whether a row of components is nonzero [P, n]. On the sample side a direction without
    # variance (rounding noise, at tau = 1) has no component. NaN must propagate.
    size = eigenvalues.shape[-1]
    kept = torch.arange(size, device=rank.device) < rank.unsqueeze(-1)
    if _feature_side(x):
        return kept
    return kept & ~(eigenvalues <= eigenvalues[..., :1] * (size * torch.finfo(F64).eps))


def _batched(batch: torch.Size, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.view((*batch, *tensor.shape[1:])) for tensor in tensors)


def aot_cases() -> Iterator[Case]:
    """The launches that himo_kernels.aot compiles."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    yield Case("pca_reconstruct N < D bfloat16", partial(_launch_fused, (4, 128, 768), bfloat16))
    yield Case("pca_reconstruct N > D float32", partial(_launch_fused, (512, 48), float32))
    yield Case("pca_reconstruct n > 128 float32", partial(_launch_fused, (1024, 768), float32))
    yield Case(
        "pca_reconstruct N = 1 float32", partial(_launch_fused, (1, 6), float32), ragged=True
    )
    for shape, dtype in (((123, 507), bfloat16), ((507, 123), float32)):
        side = "N < D" if shape[0] < shape[1] else "N > D"
        label = f"pca_reconstruct {side} {str(dtype)[6:]}, ragged"
        yield Case(label, partial(_launch_fused, shape, dtype), ragged=True)
    yield Case("pca_moment bfloat16", partial(_launch_moment, (128, 768), bfloat16))
    yield Case("pca_moment float64", partial(_launch_moment, (128, 768), F64))
    yield Case("pca_moment ragged", partial(_launch_moment, (37, 123), float32), ragged=True)
    yield Case("pca, project_reconstruct bfloat16", partial(_launch_parts, (4, 128, 768)))


def _any_rule(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    return x.new_empty((), dtype=F64), (1e-12, 0.0)


def _launch_fused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    grad, rank, mean, eigenvalues, eigenvectors = pca_reconstruct_fwd(x, *_any_rule(x))
    for differentiate_basis in (True, False):
        saved = (x, mean, eigenvalues, eigenvectors, rank)
        pca_reconstruct_bwd(grad, *saved, 1e-6, differentiate_basis)


def _launch_parts(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    mean, eigenvalues, components, rank, eigenvectors = pca_fwd(x, *_any_rule(x))
    grads = (mean, eigenvalues, components)
    pca_bwd(*grads, x, mean, eigenvalues, eigenvectors, rank, 1e-6)
    project_reconstruct_fwd(x, mean.float(), components.float(), rank)
    project_reconstruct_bwd(x, x, mean.float(), components.float(), rank)


def _launch_moment(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.empty(shape, dtype=dtype, device="meta")
    mean, moment = x.new_empty(shape[1], dtype=F64), x.new_empty((shape[1],) * 2, dtype=F64)
    decomposition = moment_decompose(moment, mean, shape[0], *_any_rule(x))
    grad = moment_reconstruct(x, mean, *decomposition)
    projector = moment_grad_projector(grad, x, mean)
    for symmetric in (projector, None):
        moment_bwd(grad, mean, x, mean, symmetric, *decomposition, 1e-6)
