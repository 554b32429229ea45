"""Eigenvalues, eigenvectors and rank of small symmetric matrices, without host synchronisation.

Steps for n <= 128, all in float64:

1. Householder reflectors reduce A to tridiagonal form, A = Q T Q^T. Each makes one pass over the
   trailing matrix, which applies the last update and computes the next product.
2. Sturm counts bracket each eigenvalue: 32 points reduce a bracket to 1/33 of its width, 11 times.
3. Two rounds of inverse iteration, by elimination with row exchanges, and Gram-Schmidt over all
   vectors. Each vector starts from its own random numbers, so equal eigenvalues give independent
   vectors. The second round removes the errors that the first Gram-Schmidt amplified.
4. Back-transformation by Q and one Newton-Schulz step V (3 I - V^T V) / 2, which squares
   V^T V - I.
5. The eigenvalues are Rayleigh quotients. A problem is certified if max |V^T V - I| and
   max |A V - V L| are at rounding level; otherwise it is solved again by Jacobi rotations
   (jacobi.py). The same program sorts the eigenpairs and chooses the rank.

Larger n uses torch.linalg.eigh, which synchronises with the host once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels import _triton
from himo_kernels._triton_jit import float64_of
from himo_kernels.covariance.triton.matmul import matmul
from himo_kernels.pca.triton.jacobi import SWEEPS, solve_by_rotations
from himo_kernels.pca.triton.tridiagonal import approximate_eigenvectors

LINES = 8  # rows or columns of a matrix held in registers at a time
LARGEST = 128  # steps 1 and 3 use one SM per problem, and their time grows as n^3

# Largest accepted |V^T V - I| and |A V - V L| / scale, divided by n. Rounding gives about 1 eps.
CERTIFIED = 16 * 2.0**-52


class Solution(NamedTuple):
    """Eigenvalues, eigenvectors and rank of P problems."""

    eigenvalues: Tensor  # [P, n], descending and >= 0
    eigenvectors: Tensor  # [P, n, n], as columns
    rank: Tensor  # [P] int64
    complete: Tensor  # [P] bool: every direction is kept and all values are finite


class Rule(NamedTuple):
    """The rule that chooses the rank: README.md (2) and (2')."""

    variance_threshold: Tensor  # [] float64
    floor: Sequence[float]  # from reference.floor_of; kernels receive it as bits
    mean: Tensor  # [P, D] float64
    samples: int  # N

    def arguments(self) -> tuple[object, ...]:
        """Returns the kernel arguments: threshold, mean, N, D, and the bits of both floors."""
        floor = (_triton.float64_bits(value) for value in self.floor)
        mean = self.mean.contiguous()
        return (self.variance_threshold, mean, self.samples, mean.shape[-1], *floor)


def solve(
    moment: Tensor,  # [P, n, n] float64, positive semi-definite
    rule: Rule,
) -> Solution:
    """Returns the eigenpairs and the smallest ranks that reach the threshold.

    The rank is n if the trace is not above the floor. Eigenpairs of a problem with NaN or inf are
    NaN. The moment may be symmetric only up to rounding. n > 128 synchronises with the host once,
    in torch.linalg.eigh.
    """
    problems, size, _ = moment.shape
    if size <= LARGEST and moment.numel():
        block = max(16, triton.next_power_of_2(size))
        return _finish(*_approximate(moment, block), rule, block)
    if moment.numel():
        eigenvalues, eigenvectors = _eigh_by_torch(moment)
    else:
        eigenvalues, eigenvectors = moment.new_empty((problems, size)), torch.empty_like(moment)
    rank, complete = choose_rank(eigenvalues, rule)
    return Solution(eigenvalues, eigenvectors, rank, complete)


def choose_rank(
    eigenvalues: Tensor,  # [P, n], descending
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """Returns rank and complete as in Solution, both [P]."""
    problems, size = eigenvalues.shape
    rank = eigenvalues.new_empty(problems, dtype=torch.int64)
    complete = eigenvalues.new_empty(problems, dtype=torch.bool)
    if problems:
        _rank_kernel[(problems,)](
            eigenvalues,
            rank,
            complete,
            *rule.arguments(),
            size,
            BLOCK=triton.next_power_of_2(size),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return rank, complete


def _eigh_by_torch(moment: Tensor) -> tuple[Tensor, Tensor]:
    # LAPACK raises for the whole batch on NaN: solve zeros for such a problem and return NaN.
    finite = moment.isfinite().all(-1).all(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, moment, 0.0))
    nan = torch.where(finite, 0.0, torch.nan)
    return values.flip(-1).clamp(min=0) + nan[:, 0], vectors.flip(-1) + nan


def _approximate(moment: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    # Steps 1 to 4. Returns pairs [P, 2, n, n] of Z = V^T and the scaled A; their products with Z
    # [P, n, 2 n], Z Z^T and Z A; and the scales [P].
    problems, size, _ = moment.shape
    pairs = moment.new_empty((problems, 2, size, size))
    z, scale = approximate_eigenvectors(moment, pairs[:, 1], block)
    # Newton-Schulz: 3/2 Z - 1/2 (Z Z^T) Z.
    overlaps = matmul(z, z.mT, torch.float64)
    z = matmul(overlaps, z, torch.float64, add=z, alpha=-0.5, beta=1.5, out=pairs[:, 0])
    products = matmul(z, pairs.view(problems, 2 * size, size).mT, torch.float64)
    return pairs, products, scale


def _finish(
    pairs: Tensor,  # [P, 2, n, n], overwritten
    products: Tensor,  # [P, n, 2 n], overwritten
    scale: Tensor,  # [P]
    rule: Rule,
    block: int,
) -> Solution:
    problems, size = len(scale), pairs.shape[-1]
    solution = Solution(
        scale.new_empty((problems, size)),
        scale.new_empty((problems, size, size)),
        scale.new_empty(problems, dtype=torch.int64),
        scale.new_empty(problems, dtype=torch.bool),
    )
    _finish_kernel[(problems,)](
        pairs,
        products,
        scale,
        scale.new_empty((problems, size)),
        *solution,
        *rule.arguments(),
        size,
        TOLERANCE=CERTIFIED * size,
        SWEEPS=SWEEPS,
        LINES=LINES,
        BLOCK=block,
        num_warps=8,
        maxnreg=255,
        enable_fp_fusion=True,
    )
    return solution


@triton.jit
def _finish_kernel(
    pairs_ptr,  # Z = V^T and A [P, 2, n, n]
    products_ptr,  # Z Z^T and Z A [P, n, 2 n]
    scale_ptr,  # [P], A was divided by it; NaN if A was not finite
    values_ptr,  # [P, n], scratch
    sorted_values_ptr,  # [P, n]
    sorted_vectors_ptr,  # V [P, n, n]
    rank_ptr,  # [P] int64
    complete_ptr,  # [P] bool
    threshold_ptr,  # [] float64
    mean_ptr,  # [P, D] float64
    samples,  # N
    features,  # D
    relative_bits,
    absolute_bits,
    n,
    TOLERANCE: tl.constexpr,
    SWEEPS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    z_ptr = pairs_ptr + problem * 2 * n * n
    products_ptr += problem * 2 * n * n
    values_ptr += problem * n
    sorted_values_ptr += problem * n
    sorted_vectors_ptr += problem * n * n
    scale = tl.load(scale_ptr + problem)
    certified = _certified(z_ptr, products_ptr, values_ptr, n, TOLERANCE, LINES, BLOCK)
    tl.debug_barrier()  # the code below reads what other threads wrote
    # A NaN scale marks a problem without a solution: skip it.
    if (certified == 0) & (scale == scale):
        plane = n * n
        solve_by_rotations(
            z_ptr + plane,
            products_ptr,
            z_ptr,
            products_ptr + plane,
            values_ptr,
            n,
            SWEEPS,
            LINES,
            BLOCK,
        )
    tl.debug_barrier()
    _sort(values_ptr, z_ptr, scale, sorted_values_ptr, sorted_vectors_ptr, n, LINES, BLOCK)
    tl.debug_barrier()
    shift = _shift(mean_ptr + problem * features, samples, features, BLOCK)
    relative, absolute = float64_of(relative_bits), float64_of(absolute_bits)
    threshold = tl.load(threshold_ptr)
    rank, complete = _rank(sorted_values_ptr, threshold, shift, relative, absolute, n, BLOCK)
    tl.store(rank_ptr + problem, rank)
    tl.store(complete_ptr + problem, complete)


@triton.jit
def _certified(
    z_ptr,  # [n, n]
    products_ptr,  # [n, 2 n]
    values_ptr,  # [n]
    n,
    TOLERANCE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Writes the Rayleigh quotients; returns 1 or 0.
    j = tl.arange(0, BLOCK)
    failures = tl.zeros([LINES], tl.int32)
    for first in range(0, n, LINES):
        i = first + tl.arange(0, LINES)
        valid = (i < n)[:, None] & (j < n)[None, :]
        z = tl.load(z_ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)
        overlap_ptrs = products_ptr + i[:, None] * 2 * n + j[None, :]
        overlap = tl.load(overlap_ptrs, mask=valid, other=0.0)
        image = tl.load(overlap_ptrs + n, mask=valid, other=0.0)
        value = tl.sum(z * image, axis=1)
        tl.store(values_ptr + i, value, mask=i < n)
        identity = tl.where((i[:, None] == j[None, :]) & valid, 1.0, 0.0)
        residual = tl.abs(image - z * value[:, None]) + tl.abs(overlap - identity)
        # Count failures: a maximum would ignore NaN.
        failures += tl.sum(tl.where(residual <= TOLERANCE, 0, 1), axis=1)
    return tl.where(tl.sum(failures) == 0, 1, 0)


@triton.jit
def _sort(
    values_ptr,  # [n]
    z_ptr,  # [n, n]
    scale,
    sorted_values_ptr,  # [n]
    sorted_vectors_ptr,  # [n, n]
    n,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.arange(0, BLOCK)
    nan = scale * 0.0
    one = tl.load(values_ptr + rows, mask=rows < n, other=-1.0)
    one = tl.where(one > 0, one, 0.0)[:, None]  # eigenvalues are >= 0; also makes NaN sortable
    for first in range(0, n, LINES):
        columns = first + tl.arange(0, LINES)
        valid = (rows < n)[:, None] & (columns < n)[None, :]
        value = tl.load(values_ptr + columns, mask=columns < n, other=-1.0)
        value = tl.where(value > 0, value, 0.0)
        other = value[None, :]
        before = (one > other) | ((one == other) & (rows[:, None] < columns[None, :]))
        place = tl.sum((before & valid).to(tl.int32), axis=0)
        v = tl.load(z_ptr + columns[None, :] * n + rows[:, None], mask=valid, other=0.0)
        tl.store(sorted_vectors_ptr + rows[:, None] * n + place[None, :], v + nan, mask=valid)
        tl.store(sorted_values_ptr + place, value * scale + nan, mask=columns < n)


@triton.jit
def _shift(mean_ptr, samples, features, BLOCK: tl.constexpr):
    # N |mean|^2, the part of sum(x^2) that centring removes.
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(0, features, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mean = tl.load(mean_ptr + index, mask=index < features, other=0.0)
        squares += mean * mean
    return tl.cast(samples, tl.float64) * tl.sum(squares)


@triton.jit
def _rank(values_ptr, threshold, shift, relative, absolute, n, BLOCK: tl.constexpr):
    # Returns the rank for descending eigenvalues [n], and whether all are kept and finite.
    index = tl.arange(0, BLOCK)
    value = tl.load(values_ptr + index, mask=index < n, other=0.0)
    cumulative = tl.cumsum(value)
    # The same sum, so the last ratio is exactly 1 and reaches a threshold of 1.
    trace = tl.sum(tl.where(index == n - 1, cumulative, 0.0))
    short = (cumulative / trace < threshold) & (index < n)
    has_variance = trace > relative * (trace + shift) + absolute  # false for NaN
    rank = tl.where(has_variance, 1 + tl.sum(short.to(tl.int64)), n)
    infinite = tl.sum(tl.where(tl.abs(value) < float("inf"), 0, 1))
    return rank, (rank == n) & (infinite == 0)


@triton.jit
def _rank_kernel(
    values_ptr,  # [P, n]
    rank_ptr,  # [P] int64
    complete_ptr,  # [P] bool
    threshold_ptr,  # [] float64
    mean_ptr,  # [P, D] float64
    samples,  # N
    features,  # D
    relative_bits,
    absolute_bits,
    n,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    shift = _shift(mean_ptr + problem * features, samples, features, BLOCK)
    relative, absolute = float64_of(relative_bits), float64_of(absolute_bits)
    values_ptr += problem * n
    threshold = tl.load(threshold_ptr)
    rank, complete = _rank(values_ptr, threshold, shift, relative, absolute, n, BLOCK)
    tl.store(rank_ptr + problem, rank)
    tl.store(complete_ptr + problem, complete)
