"""The `cpu` backend of pca, project_reconstruct and pca_reconstruct: csrc/pca.cpp, any strides.

Same formula as the reference with less work and memory. Kept and dropped directions are slices of
the eigenvectors, and products use the smaller of the two. For float32 and lower input the products
of pca_reconstruct are float32; its decomposition is float64. Problems of a batch run in parallel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from himo_kernels import extension

LARGEST_SIDE = 32766  # the length of LAPACK's work array, 1 + 6 n + 2 n^2, is a 32-bit integer


def why_not_decompose(x: Tensor, *_: Tensor) -> str | None:
    """Returns why this backend cannot solve the eigenproblem of x, or None."""
    if not torch._C.has_lapack:
        return "this torch is built without LAPACK"
    if min(x.shape[-2:]) > LARGEST_SIDE:
        return f"takes min(N, D) up to {LARGEST_SIDE}, got {min(x.shape[-2:])}"
    return extension.why_not_for(x)


def pca_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns mean [*, D], eigenvalues [*, n], components [*, n, D], rank [*], V [*, n, n]."""
    return extension.load().pca_fwd(x, variance_threshold.item(), floor)


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
    """Returns the gradient of x [*, N, D], computed in float64: README.md (8) to (10)."""
    saved = (mean, eigenvalues, eigenvectors, rank)
    return extension.load().pca_bwd(
        grad_mean, grad_eigenvalues, grad_components, x, *saved, gap_eps
    )


def project_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> Tensor:
    """Returns (x - mean) P^T P + mean, with P the first rank rows of components."""
    return extension.load().project_reconstruct_fwd(x, mean, components, rank)


def project_reconstruct_bwd(
    grad_reconstruction: Tensor,  # [*, N, D]
    x: Tensor,  # [*, N, D]
    mean: Tensor,  # [*, D]
    components: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x [*, N, D], mean [*, D] and components [*, K, D]."""
    return extension.load().project_reconstruct_bwd(grad_reconstruction, x, mean, components, rank)


def pca_reconstruct_fwd(
    x: Tensor,  # [*, N, D]
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns U' [*, N, D] in x's dtype, rank [*], mean [*, D], eigenvalues [*, n], V [*, n, n]."""
    return extension.load().pca_reconstruct_fwd(x, variance_threshold.item(), floor)


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
    """Returns the gradient of x [*, N, D], README.md equations (4) to (7)."""
    saved = (mean, eigenvalues, eigenvectors, rank)
    return extension.load().pca_reconstruct_bwd(
        grad_reconstruction, x, *saved, gap_eps, differentiate_basis
    )


def moment_decompose(
    moment: Tensor,  # [D, D] float64
    mean: Tensor,  # [D] float64
    samples: int,  # N
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues [D], eigenvectors [D, D], rank []."""
    threshold = variance_threshold.item()
    return extension.load().pca_moment_decompose(moment, mean, samples, threshold, floor)


def moment_reconstruct(
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
    eigenvalues: Tensor,  # [D] float64
    eigenvectors: Tensor,  # [D, D] float64
    rank: Tensor,  # [] int64
) -> Tensor:
    """Returns U' [M, D] in x's dtype; products in float64."""
    return extension.load().pca_moment_reconstruct(x, mean, eigenvalues, eigenvectors, rank)


def moment_grad_projector(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
) -> Tensor:
    """Returns X^T G [D, D] float64."""
    return extension.load().pca_moment_grad_projector(grad, x, mean)


def moment_bwd(
    grad: Tensor,  # [M, D]
    grad_mean: Tensor,  # [D] float64
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
    symmetric: Tensor | None,  # [D, D] float64
    eigenvalues: Tensor,  # [D] float64
    eigenvectors: Tensor,  # [D, D] float64
    rank: Tensor,  # [] int64
    gap_eps: float,
) -> Tensor:
    """Returns dX [M, D] in x's dtype; products in float64."""
    decomposition = (eigenvalues, eigenvectors, rank)
    return extension.load().pca_moment_bwd(
        grad, grad_mean, x, mean, symmetric, *decomposition, gap_eps
    )
