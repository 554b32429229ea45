"""The steps after the eigensolver on the feature side, for a whole batch or some of its rows.

The moment_* functions implement himo_kernels/pca/moment.py, with signatures as in reference.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himo_kernels.covariance.triton.matmul import matmul
from himo_kernels.pca.triton.eigensolver import Rule, solve
from himo_kernels.pca.triton.weights import weigh_pairs

F64 = torch.float64
Options = dict[str, Any]  # keyword arguments of matmul


def moment_decompose(
    moment: Tensor,  # [D, D] float64
    mean: Tensor,  # [D] float64
    samples: int,  # N
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from reference.floor_of
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns eigenvalues [D], eigenvectors [D, D], rank []."""
    rule = Rule(variance_threshold, floor, mean.unsqueeze(0), samples)
    solution = solve(moment.unsqueeze(0), rule)
    return solution.eigenvalues[0], solution.eigenvectors[0], solution.rank[0]


def moment_reconstruct(
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
    eigenvalues: Tensor,  # [D] float64
    eigenvectors: Tensor,  # [D, D] float64
    rank: Tensor,  # [] int64
) -> Tensor:
    """Returns U' [M, D] of some rows of the decomposed batch, in x's dtype."""
    return _projected(x, mean, eigenvalues, eigenvectors, rank, mean)


def moment_grad_projector(
    grad: Tensor,  # [M, D]
    x: Tensor,  # [M, D]
    mean: Tensor,  # [D] float64
) -> Tensor:
    """Returns B = X^T G [D, D] float64, summed over these rows: eq. (4)."""
    return matmul(x.mT[None], grad[None], F64, mean=mean[None], a_mean="rows")[0]


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
    add = grad_mean[None, None]
    if symmetric is not None:
        decomposition = (eigenvalues[None], eigenvectors[None], rank[None])
        grad_c = grad_moment(symmetric[None], *decomposition, gap_eps)  # dC
        add = matmul(x[None], grad_c, F64, mean=mean[None], a_mean="inner", add=add)
    return _projected(grad, grad_mean, eigenvalues, eigenvectors, rank, add)


def _projected(
    values: Tensor,  # [M, D]
    mean: Tensor,  # [D]
    eigenvalues: Tensor,  # [D]
    eigenvectors: Tensor,  # [D, D]
    rank: Tensor,  # []
    add: Tensor,  # broadcasts to [1, M, D]
) -> Tensor:
    # (values - mean) Pi + add in the dtype of values; values unchanged if every direction is kept.
    limit: Options = {"limit": rank[None]}
    vectors = eigenvectors[None]
    left = matmul(
        values[None], vectors, F64, mean=mean[None], a_mean="inner", limited="columns", **limit
    )
    found = finished(
        values.shape, values[None], left, vectors.mT, limited="inner", add=add, **limit
    )
    return torch.where(identity(eigenvalues[None], rank[None])[0], values, found)


def grad_moment(
    symmetric: Tensor,  # B + B^T [P, n, n]
    eigenvalues: Tensor,  # [P, n]
    eigenvectors: Tensor,  # [P, n, n]
    rank: Tensor,  # [P]
    gap_eps: float,
) -> Tensor:
    """Returns dC [P, n, n], equations (5) and (6). Forms only the first rank rows of H."""
    pairs = matmul(eigenvectors.mT, symmetric, F64, limited="rows", limit=rank)
    pairs = matmul(pairs, eigenvectors, F64, limited="rows", limit=rank)
    weigh_pairs(pairs, eigenvalues, rank, gap_eps)
    pairs = matmul(pairs, eigenvectors.mT, F64, limited="rows", limit=rank)
    half = matmul(eigenvectors, pairs, F64, limited="inner", limit=rank)
    return half + half.mT


def identity(eigenvalues: Tensor, rank: Tensor) -> Tensor:
    """Returns whether every direction of a problem is kept, [P, 1, 1]; False for NaN."""
    complete = (rank == eigenvalues.shape[-1]) & eigenvalues.isfinite().all(-1)
    return complete[..., None, None]


def finished(shape: torch.Size, x: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """Returns a @ b + add in this shape and the dtype of x, summed in the wider of their dtypes."""
    out = x.new_empty(x.shape)
    sums = F64 if F64 in (a.dtype, b.dtype) else a.dtype
    return matmul(a, b, sums, out=out, **options).view(shape)
