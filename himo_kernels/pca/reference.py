"""The specification of pca, project_reconstruct and pca_reconstruct: plain PyTorch.

A PCA is computed in float64. An X^T X summed and solved in float32 loses digits that an SVD of X
keeps: the gradient error reaches 1.8e-1 at 1024 x 768. Notation of README.md: X = x - mean,
V holds the eigenvectors of the small side (X^T X when D <= N, X X^T when N < D), n = min(N, D).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def floor_of(dtype: torch.dtype, variance_floor: float | str) -> tuple[float, float]:
    """Returns f and g: a batch has no variance if trace <= f sum(x^2) + g, README.md (2').

    For equal rows, rounding leaves a trace of a few eps^2 sum(x^2). "relative" is above that at any
    scale of x. A number sets g, with f = 0.
    """
    if isinstance(variance_floor, str):  # "relative"
        return (8 * torch.finfo(dtype).eps) ** 2, 0.0
    return 0.0, float(variance_floor)


def has_variance(
    trace: Tensor,  # [*]
    mean: Tensor,  # [*, D] float64
    samples: int,  # N
    floor: Sequence[float],  # from floor_of
) -> Tensor:
    """Returns whether the trace is above the floor [*]; sum(x^2) = trace + N |mean|^2."""
    energy = trace + samples * mean.square().sum(-1)
    return trace > floor[0] * energy + floor[1]  # False for NaN


def pca_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from floor_of
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns mean [*, D], eigenvalues [*, n], components [*, n, D], rank [*], V [*, n, n].

    float64, rank int64. Rows of components at and past rank are zero.
    """
    mean, centred = _centre(x)
    moment = centred.mT @ centred if _feature_side(x) else centred @ centred.mT
    eigenvalues, eigenvectors, rank = moment_decompose(
        moment, mean, x.shape[-2], variance_threshold, floor
    )
    components = _components(centred, eigenvalues, eigenvectors, rank)
    return mean, eigenvalues, components, rank, eigenvectors


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
    """Returns the gradient of x [*, N, D]; README.md equations (8) to (10)."""
    centred = x.double() - mean.unsqueeze(-2)
    components = _components(centred, eigenvalues, eigenvectors, rank)  # P, zero past rank
    kept = _kept_columns(eigenvalues, rank)
    grad_components = torch.where(_present(x, eigenvalues, kept), grad_components, 0.0)
    if _feature_side(x):
        pair_weights = _pair_weights(eigenvalues, kept, gap_eps)  # F [*, n, n]
        h = (pair_weights * (grad_components @ eigenvectors)) @ eigenvectors.mT  # eq. (8)
        axes = centred @ eigenvectors  # [*, N, n]
        grad_centred = 2 * (axes * grad_eigenvalues.unsqueeze(-2)) @ eigenvectors.mT
    else:
        # D - N directions have variance 0 and no eigenvector here. Eq. (9) treats them together,
        # as the complement of P, and corrects the dropped directions with a bounded weight.
        null_weights = _null_weights(eigenvalues, kept, gap_eps).unsqueeze(-1)
        outside = grad_components - (grad_components @ components.mT) @ components
        axes = eigenvectors.mT @ centred  # rows a_j [*, n, D]
        scaled_axes = axes / _last_kept(eigenvalues, kept).sqrt().unsqueeze(-1)
        overlaps = grad_components @ scaled_axes.mT
        corrections = _null_corrections(eigenvalues, kept, gap_eps) * overlaps
        h = null_weights * outside + corrections @ scaled_axes  # eq. (9)
        grad_centred = 2 * eigenvectors @ (axes * grad_eigenvalues.unsqueeze(-1))
    grad_centred = grad_centred + (centred @ h.mT) @ components  # eq. (10)
    grad_centred = grad_centred + (centred @ components.mT) @ h
    return _uncentre(grad_centred, grad_mean / x.shape[-2]).to(x.dtype)


def project_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> Tensor:
    """Returns (x - mean) P^T P + mean, with P the first rank rows of components."""
    components = _first_rows(components, rank)
    centred = x.to(mean.dtype) - mean.unsqueeze(-2)
    return ((centred @ components.mT) @ components + mean.unsqueeze(-2)).to(x.dtype)


def project_reconstruct_bwd(
    grad_reconstruction: Tensor,  # [*, N, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x [*, N, D], mean [*, D] and components [*, K, D]."""
    components = _first_rows(components, rank)
    centred = x.to(mean.dtype) - mean.unsqueeze(-2)
    grad = grad_reconstruction.to(mean.dtype)
    coefficients, grad_coefficients = centred @ components.mT, grad @ components.mT  # [*, N, K]
    grad_x = grad_coefficients @ components
    grad_components = coefficients.mT @ grad + grad_coefficients.mT @ centred
    return grad_x.to(x.dtype), (grad - grad_x).sum(-2), grad_components


def pca_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from floor_of
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns U' [*, N, D] in x's dtype, rank [*], mean [*, D], eigenvalues [*, n], V [*, n, n]."""
    mean, centred = _centre(x)
    moment = centred.mT @ centred if _feature_side(x) else centred @ centred.mT
    eigenvalues, eigenvectors, rank = moment_decompose(
        moment, mean, x.shape[-2], variance_threshold, floor
    )
    reconstruction = reconstruct(x, mean, eigenvalues, eigenvectors, rank)
    return reconstruction, rank, mean, eigenvalues, eigenvectors


def reconstruct(
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D] float64
    eigenvalues: Tensor,  # [*, n] float64
    eigenvectors: Tensor,  # [*, n, n] float64
    rank: Tensor,  # [*] int64
) -> Tensor:
    """Returns U' [*, N, D] in x's dtype from the decomposition of x."""
    centred = x.double() - mean.unsqueeze(-2)
    projected = _project(centred, eigenvectors, _kept_columns(eigenvalues, rank))
    reconstruction = projected + mean.unsqueeze(-2)  # HiMo-CLIP eq. (1)
    identity = _is_identity(eigenvalues, rank)
    return torch.where(identity, x.double(), reconstruction).to(x.dtype)


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
    """Returns the gradient of x [*, N, D]; README.md equations (4) to (7)."""
    centred = x.double() - mean.unsqueeze(-2)
    grad = grad_reconstruction.double()
    if not differentiate_basis:
        components = _components(centred, eigenvalues, eigenvectors, rank)
        grad_centred = (grad @ components.mT) @ components  # G Pi
        grad_centred = torch.where(_is_identity(eigenvalues, rank), grad, grad_centred)
        return _uncentre(grad_centred, grad.mean(-2)).to(x.dtype)
    kept = _kept_columns(eigenvalues, rank)
    grad_projector = centred.mT @ grad if _feature_side(x) else grad @ centred.mT  # B, eq. (4)
    grad_projector = grad_projector + grad_projector.mT
    grad_moment = _grad_moment(grad_projector, eigenvalues, eigenvectors, rank, gap_eps)
    grad_centred = _project(grad, eigenvectors, kept) + (
        centred @ grad_moment if _feature_side(x) else grad_moment @ centred
    )
    return _uncentre(grad_centred, grad.mean(-2)).to(x.dtype)


def _grad_moment(
    grad_projector: Tensor,  # [*, n, n], B + B^T with B = dL/dPi
    eigenvalues: Tensor,  # [*, n]
    eigenvectors: Tensor,  # [*, n, n]
    rank: Tensor,  # [*] int64
    gap_eps: float,
) -> Tensor:
    """Returns the gradient of the decomposed moment, X^T X or X X^T: equations (5) and (6)."""
    in_basis = eigenvectors.mT @ grad_projector @ eigenvectors
    in_basis = in_basis * _pair_weights(eigenvalues, _kept_columns(eigenvalues, rank), gap_eps)
    return eigenvectors @ (in_basis + in_basis.mT) @ eigenvectors.mT


def moment_reconstruct(
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
    eigenvalues: Tensor,  # [D] float64
    eigenvectors: Tensor,  # [D, D] float64
    rank: Tensor,  # [] int64
) -> Tensor:
    """Returns U' [M, D] of some rows of the decomposed batch, in x's dtype."""
    centred = x.double() - mean
    basis = torch.where(_kept_columns(eigenvalues, rank), eigenvectors, 0.0)
    reconstruction = (centred @ basis) @ basis.mT + mean
    identity = _is_identity(eigenvalues, rank).squeeze(-1)
    return torch.where(identity, x.double(), reconstruction).to(x.dtype)


def moment_grad_projector(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
) -> Tensor:
    """Returns B = X^T G [D, D] float64, summed over these rows: eq. (4)."""
    return (x.double() - mean).mT @ grad.double()


def moment_bwd(
    grad: Tensor,  # [M, D]
    grad_mean: Tensor,  # [D] float64, over the whole batch
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
    symmetric: Tensor | None,  # [D, D] float64: B + B^T of the whole batch; None: constant basis
    eigenvalues: Tensor,  # [D] float64
    eigenvectors: Tensor,  # [D, D] float64
    rank: Tensor,  # [] int64
    gap_eps: float,
) -> Tensor:
    """Returns dX [M, D] of these rows, in x's dtype: eq. (5) to (7)."""
    # The centred rows of the whole batch sum to 0, so only G Pi has a mean.
    basis = torch.where(_kept_columns(eigenvalues, rank), eigenvectors, 0.0)
    grad_x = ((grad.double() - grad_mean) @ basis) @ basis.mT + grad_mean
    if symmetric is not None:
        grad_moment = _grad_moment(symmetric, eigenvalues, eigenvectors, rank, gap_eps)
        grad_x = grad_x + (x.double() - mean) @ grad_moment
    identity = _is_identity(eigenvalues, rank).squeeze(-1)
    return torch.where(identity, grad.double(), grad_x).to(x.dtype)


def _feature_side(x: Tensor) -> bool:
    return x.shape[-1] <= x.shape[-2]  # D <= N: the D x D side is the smaller one


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    mean = x.mean(-2)
    return mean, x - mean.unsqueeze(-2)


def _uncentre(grad_centred: Tensor, grad_mean: Tensor) -> Tensor:
    # The mean is subtracted and added back: dU = dX - mean(dX) + grad_mean, the gradient of the
    # added mean divided by N.
    return grad_centred + (grad_mean - grad_centred.mean(-2)).unsqueeze(-2)


def moment_decompose(
    moment: Tensor,  # [*, n, n] float64, of the small side
    mean: Tensor,  # [*, D] float64
    samples: int,  # N
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from floor_of
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues [*, n] descending, eigenvectors [*, n, n] in columns, rank [*]."""
    # LAPACK raises for the whole batch on NaN: solve zeros for such a problem and return NaN.
    finite = moment.isfinite().all(-1).all(-1)
    eigenvalues, eigenvectors = torch.linalg.eigh(
        torch.where(finite[..., None, None], moment, torch.zeros_like(moment))
    )
    eigenvalues = eigenvalues.flip(-1).clamp(min=0)  # the matrix is positive semi-definite
    cumulative = _cumulative_sum(eigenvalues)
    trace = cumulative[..., -1]  # the same sum, so the last ratio is exactly 1 (for tau = 1)
    rank = 1 + (cumulative / trace.unsqueeze(-1) < variance_threshold).sum(-1)
    varies = has_variance(trace, mean, samples, floor)
    rank = torch.where(varies, rank, eigenvalues.shape[-1])
    nan = torch.where(finite, 0.0, torch.nan).to(eigenvalues)
    return eigenvalues + nan[..., None], eigenvectors.flip(-1) + nan[..., None, None], rank


def _cumulative_sum(values: Tensor) -> Tensor:
    # A product with a triangular matrix: torch.cumsum has no deterministic CUDA kernel.
    ones = torch.ones(values.shape[-1:] * 2, dtype=values.dtype, device=values.device)
    return (values.unsqueeze(-2) @ ones.triu()).squeeze(-2)


def _first_rows(components: Tensor, rank: Tensor) -> Tensor:
    rows = torch.arange(components.shape[-2], device=rank.device)
    return torch.where((rows < rank.unsqueeze(-1)).unsqueeze(-1), components, 0.0)


def _kept_columns(eigenvalues: Tensor, rank: Tensor) -> Tensor:
    """Returns True for the first rank directions, [*, n]."""
    return torch.arange(eigenvalues.shape[-1], device=rank.device) < rank.unsqueeze(-1)


def _nonzero(eigenvalues: Tensor, kept: Tensor) -> Tensor:
    # Kept directions with variance: at tau = 1 the last ones are rounding noise.
    noise = eigenvalues[..., :1] * eigenvalues.shape[-1] * torch.finfo(eigenvalues.dtype).eps
    return kept & ~(eigenvalues <= noise)  # True for NaN, which must propagate


def _present(x: Tensor, eigenvalues: Tensor, kept: Tensor) -> Tensor:
    # Rows of components that are not zero [*, n, 1]. On the sample side a direction without
    # variance has no component: X^T v / sqrt(lambda) is 0 / 0.
    return (kept if _feature_side(x) else _nonzero(eigenvalues, kept)).unsqueeze(-1)


def _components(centred: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, rank: Tensor) -> Tensor:
    # P [*, n, D]: kept eigenvectors of X^T X as rows, zero past rank.
    present = _present(centred, eigenvalues, _kept_columns(eigenvalues, rank))
    if _feature_side(centred):
        rows = eigenvectors.mT
    else:
        norms = torch.where(present, eigenvalues.unsqueeze(-1), 1.0).sqrt()
        rows = (eigenvectors.mT @ centred) / norms
    return torch.where(present, rows, 0.0)


def _is_identity(eigenvalues: Tensor, rank: Tensor) -> Tensor:
    """Returns whether every direction of a problem is kept, [*, 1, 1]; False for NaN."""
    identity = (rank == eigenvalues.shape[-1]) & eigenvalues.isfinite().all(-1)
    return identity[..., None, None]


def _project(values: Tensor, eigenvectors: Tensor, kept: Tensor) -> Tensor:
    # values Pi [*, N, D]. On the sample side X Pi = W W^T X, which needs no components.
    basis = torch.where(kept.unsqueeze(-2), eigenvectors, 0.0)
    if _feature_side(values):
        return (values @ basis) @ basis.mT
    return basis @ (basis.mT @ values)


def _last_kept(eigenvalues: Tensor, kept: Tensor) -> Tensor:
    # lambda_R [*, 1]. The weights below divide eigenvalues by it, since their squares may overflow.
    last_kept = torch.where(kept, eigenvalues, torch.inf).amin(-1, keepdim=True)
    return torch.where(last_kept == 0, 1.0, last_kept)  # if 0, the rank is n: nothing is dropped


def _gaps(eigenvalues: Tensor, last_kept: Tensor) -> Tensor:
    # delta_ij / lambda_R [*, n, n]. Subtract first: the difference of close values is exact.
    return (eigenvalues.unsqueeze(-1) - eigenvalues.unsqueeze(-2)) / last_kept.unsqueeze(-1)


def _pairs(kept: Tensor) -> Tensor:
    return kept.unsqueeze(-1) & ~kept.unsqueeze(-2)  # i kept, j dropped


def _pair_weights(eigenvalues: Tensor, kept: Tensor, gap_eps: float) -> Tensor:
    # F_ij = delta / (delta^2 + (gap_eps lambda_R)^2) for i kept, j dropped; 0 for every other
    # pair, and at delta = 0, the limit for every gap_eps > 0.
    last_kept = _last_kept(eigenvalues, kept)
    gaps = _gaps(eigenvalues, last_kept)
    valid = _pairs(kept) & (gaps != 0)
    denominator = torch.where(valid, gaps + gap_eps**2 / gaps, 1.0)
    return torch.where(valid, 1 / denominator, 0.0) / last_kept.unsqueeze(-1)


def _null_weights(eigenvalues: Tensor, kept: Tensor, gap_eps: float) -> Tensor:
    # F_i0, the pair weight of kept i with a direction of variance 0.
    last_kept = _last_kept(eigenvalues, kept)
    relative = eigenvalues / last_kept
    valid = _nonzero(eigenvalues, kept)
    denominator = torch.where(valid, relative + gap_eps**2 / relative, 1.0)
    return torch.where(valid, 1 / denominator, 0.0) / last_kept


def _null_corrections(eigenvalues: Tensor, kept: Tensor, gap_eps: float) -> Tensor:
    # lambda_R (F_ij - F_i0) / lambda_j, without a division by lambda_j: eq. (9). It multiplies two
    # vectors a_j, each divided by sqrt(lambda_R).
    last_kept = _last_kept(eigenvalues, kept)
    gaps = _gaps(eigenvalues, last_kept)
    kept_values = (eigenvalues / last_kept).unsqueeze(-1)
    valid = _pairs(kept) & (gaps != 0) & _nonzero(eigenvalues, kept).unsqueeze(-1)
    numerator = torch.where(valid, gaps * kept_values - gap_eps**2, 0.0)
    denominator = (gaps.square() + gap_eps**2) * (kept_values.square() + gap_eps**2)
    weights = numerator / torch.where(valid, denominator, 1.0)
    return weights / last_kept.unsqueeze(-1)
