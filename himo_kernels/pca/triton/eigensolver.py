"""Eigenvalues, eigenvectors and rank of small symmetric matrices, without a word to the host.

n <= 128, one problem a program or several, all in float64:

1. Householder reflectors make A tridiagonal, A = Q T Q^T, in one pass over what is left of A for
   each: the last update and the next product.
2. Sturm counts bracket each eigenvalue: 32 points cut a bracket to a 33rd, 11 times.
3. Twice: a step of inverse iteration, by elimination with row exchanges, and Gram-Schmidt over all
   vectors. The first starts from random numbers of its own for each vector: equal eigenvalues then
   give independent vectors, and the second step heals what their Gram-Schmidt magnified.
4. Back to A by Q, and one Newton-Schulz step V (3 I - V^T V) / 2, which squares what is left of
   V^T V - I.
5. Rayleigh quotients are the eigenvalues. A problem is certified when max |V^T V - I| and
   max |A V - V L| are rounding; one that is not is solved again by Jacobi rotations (jacobi.py).

Larger n: torch.linalg.eigh, which waits for the host once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels.covariance.triton.matmul import matmul
from himo_kernels.pca.triton.jacobi import jacobi_where_not
from himo_kernels.pca.triton.tridiagonal import approximate_eigenvectors

COLUMNS = 16  # of a matrix in registers at a time
LARGEST = 128  # steps 1 and 3 have one SM for a problem, and time grows as n^3 beyond

# Largest accepted |V^T V - I| and |A V - V L| / scale, per n: what rounding leaves is about 1.
CERTIFIED = 16 * 2.0**-52


def eigh_descending(
    moment: Tensor,  # [P, n, n] float64, positive semi-definite
) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues [P, n], descending and >= 0, and eigenvectors in columns [P, n, n].

    NaN for a problem that holds NaN or inf. Symmetric up to rounding is enough. n > 128 waits for
    the host once, in torch.linalg.eigh.
    """
    size = moment.shape[-1]
    if moment.numel() == 0:
        return moment.new_empty(moment.shape[:-1]), torch.empty_like(moment)
    if size > LARGEST:
        return _eigh_by_torch(moment)
    block = max(16, triton.next_power_of_2(size))
    vectors, scale = approximate_eigenvectors(moment, block)
    # Newton-Schulz, as V times (3 I - V^T V) / 2.
    step = matmul(vectors.mT, vectors, torch.float64).mul_(-0.5)
    step.diagonal(dim1=-2, dim2=-1).add_(1.5)
    vectors = matmul(vectors, step, torch.float64)
    overlaps = matmul(vectors.mT, vectors, torch.float64)
    images = matmul(moment, vectors, torch.float64)
    values, certified = _certify(vectors, overlaps, images, scale, block)
    jacobi_where_not(certified, moment, scale, values, vectors, (overlaps, images))
    return _sort(values, vectors, scale, block)


def choose_rank(
    eigenvalues: Tensor,  # [P, n], descending
    variance_threshold: float,
    zero_variance: float,
) -> Tensor:
    """Returns the smallest ranks [P] that reach the threshold; n where the trace is too small."""
    problems, size = eigenvalues.shape
    rank = eigenvalues.new_empty(problems, dtype=torch.int64)
    if problems:
        # Tensors: a Python float would reach the kernel as float32.
        threshold, least = (
            eigenvalues.new_full((), x) for x in (variance_threshold, zero_variance)
        )
        _rank_kernel[(problems,)](
            eigenvalues,
            rank,
            threshold,
            least,
            size,
            BLOCK=triton.next_power_of_2(size),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return rank


def _eigh_by_torch(moment: Tensor) -> tuple[Tensor, Tensor]:
    # LAPACK raises on NaN, for all problems of the batch: solve zeros there and return NaN.
    finite = moment.isfinite().all(-1).all(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, moment, 0.0))
    nan = torch.where(finite, 0.0, torch.nan)
    return values.flip(-1).clamp(min=0) + nan[:, 0], vectors.flip(-1) + nan


def _certify(
    vectors: Tensor, overlaps: Tensor, images: Tensor, scale: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    # Rayleigh quotients [P, n], and 1 or 0 [P]; NaN problems count as certified.
    problems, size, _ = vectors.shape
    values = vectors.new_empty((problems, size))
    certified = vectors.new_empty(problems, dtype=torch.int32)
    _certify_kernel[(problems,)](
        vectors,
        overlaps,
        images,
        scale,
        values,
        certified,
        size,
        TOLERANCE=CERTIFIED * size,
        COLUMNS=COLUMNS,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return values, certified


def _sort(values: Tensor, vectors: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    sorted_values, sorted_vectors = torch.empty_like(values), torch.empty_like(vectors)
    _sort_kernel[(len(values),)](
        values,
        vectors,
        scale,
        sorted_values,
        sorted_vectors,
        values.shape[-1],
        COLUMNS=COLUMNS,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sorted_values, sorted_vectors


@triton.jit
def _certify_kernel(
    vectors_ptr,  # V [P, n, n]
    overlaps_ptr,  # V^T V
    images_ptr,  # A V
    scale_ptr,  # [P]
    values_ptr,  # [P, n]
    certified_ptr,  # [P] int32
    n,
    TOLERANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + problem)
    failures = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, n, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        valid = (rows < n)[:, None] & (columns < n)[None, :]
        tile = problem * n * n + rows[:, None] * n + columns[None, :]
        v = tl.load(vectors_ptr + tile, mask=valid, other=0.0)
        image = tl.load(images_ptr + tile, mask=valid, other=0.0) / scale
        value = tl.sum(v * image, axis=0)
        tl.store(values_ptr + problem * n + columns, value * scale, mask=columns < n)
        residual = tl.abs(image - v * value[None, :])
        identity = tl.where((rows[:, None] == columns[None, :]) & valid, 1.0, 0.0)
        residual += tl.abs(tl.load(overlaps_ptr + tile, mask=valid, other=0.0) - identity)
        # Counted, for a maximum passes over NaN.
        failures += tl.sum(tl.where(residual <= TOLERANCE, 0, 1), axis=0)
    # Where scale is NaN there is nothing to solve again.
    good = (tl.sum(failures) == 0) | (scale != scale)
    tl.store(certified_ptr + problem, good.to(tl.int32))


@triton.jit
def _sort_kernel(
    values_ptr,  # [P, n]
    vectors_ptr,  # [P, n, n]
    scale_ptr,  # [P]
    sorted_values_ptr,  # [P, n]
    sorted_vectors_ptr,  # [P, n, n]
    n,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    nan = tl.load(scale_ptr + problem) * 0.0
    one = tl.load(values_ptr + problem * n + rows, mask=rows < n, other=-1.0)
    one = tl.where(one > 0, one, 0.0)[:, None]  # of a positive semi-definite matrix; NaN in order
    for first in range(0, n, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        valid = (rows < n)[:, None] & (columns < n)[None, :]
        value = tl.load(values_ptr + problem * n + columns, mask=columns < n, other=-1.0)
        value = tl.where(value > 0, value, 0.0)
        other = value[None, :]
        before = (one > other) | ((one == other) & (rows[:, None] < columns[None, :]))
        place = tl.sum((before & valid).to(tl.int32), axis=0)
        tile = problem * n * n + rows[:, None] * n
        v = tl.load(vectors_ptr + tile + columns[None, :], mask=valid, other=0.0)
        tl.store(sorted_vectors_ptr + tile + place[None, :], v + nan, mask=valid)
        tl.store(sorted_values_ptr + problem * n + place, value + nan, mask=columns < n)


@triton.jit
def _rank_kernel(
    values_ptr,  # [P, n]
    rank_ptr,  # [P]
    threshold_ptr,  # []
    zero_variance_ptr,  # []
    n,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    value = tl.load(values_ptr + problem * n + index, mask=index < n, other=0.0)
    cumulative = tl.cumsum(value)
    # The same sum: the last ratio is 1, so that a threshold of 1 is reached.
    trace = tl.sum(tl.where(index == n - 1, cumulative, 0.0))
    short = (cumulative / trace < tl.load(threshold_ptr)) & (index < n)
    rank = 1 + tl.sum(short.to(tl.int64))
    has_variance = trace > tl.load(zero_variance_ptr)  # false for NaN
    tl.store(rank_ptr + problem, tl.where(has_variance, rank, n))
