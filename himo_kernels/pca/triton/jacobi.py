"""Jacobi rotations: the second try of the eigensolver, which no spectrum defeats.

A = V L V^T by plane rotations, n / 2 disjoint pairs at a time: round r turns the planes (i, i ^ r),
and the n - 1 rounds of a sweep meet every pair once. Rotations keep V orthonormal whatever the
spectrum. A sweep that meets no off-diagonal element above rounding is the last.
"""

import triton
import triton.language as tl
from torch import Tensor

SWEEPS = 24  # a bound; convergence is quadratic after a few, and takes 6 to 10
ROWS = 16  # rows of the matrix in registers at a time

_EPS = tl.constexpr(2.0**-52)


def jacobi_where_not(
    certified: Tensor,  # [P] int32
    moment: Tensor,  # [P, n, n] float64, overwritten
    scale: Tensor,  # [P]
    values: Tensor,  # [P, n], written
    vectors: Tensor,  # [P, n, n], written
    scratch: tuple[Tensor, Tensor],  # each [P, n, n]
) -> None:
    """Writes eigenvalues and eigenvectors of the problems that are not certified.

    In no order. The programs of the others return at once.
    """
    problems, size, _ = moment.shape
    block = triton.next_power_of_2(size)
    _jacobi_kernel[(problems,)](
        certified,
        moment,
        scratch[0],
        vectors,
        scratch[1],
        scale,
        values,
        size,
        SWEEPS=SWEEPS,
        ROWS=min(ROWS, block),
        BLOCK=block,
        num_warps=8,
        maxnreg=255,
        enable_fp_fusion=True,
    )


@triton.jit
def _jacobi_kernel(
    certified_ptr,  # [P]
    moment_ptr,  # [P, n, n]
    other_moment_ptr,  # [P, n, n]
    vectors_ptr,  # [P, n, n]
    other_vectors_ptr,  # [P, n, n]
    scale_ptr,  # [P]
    values_ptr,  # [P, n]
    n,
    SWEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(certified_ptr + problem) != 0:
        return
    scale = tl.load(scale_ptr + problem)
    j = tl.arange(0, BLOCK)
    start = problem * n * n
    out_ptr = vectors_ptr + start
    # A round reads one matrix and writes the other: no thread overwrites what another still reads.
    a_ptr, next_a_ptr = other_moment_ptr + start, moment_ptr + start
    v_ptr, next_v_ptr = vectors_ptr + start, other_vectors_ptr + start
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        a = 0.5 * tl.load(next_a_ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)
        a += 0.5 * tl.load(next_a_ptr + j[None, :] * n + i[:, None], mask=valid, other=0.0)
        tl.store(a_ptr + i[:, None] * n + j[None, :], a / scale, mask=valid)
        identity = tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(tl.float64)
        tl.store(v_ptr + i[:, None] * n + j[None, :], identity, mask=valid)
    tl.debug_barrier()

    sweep = 0
    largest = scale * 0.0 + 1.0
    while (largest > _EPS) & (sweep < SWEEPS):
        largest = scale * 0.0
        for r in range(1, BLOCK):
            c, s, d, off = _rotation(a_ptr, j, r, n)
            largest = tl.maximum(largest, tl.max(tl.abs(off)))
            partner = j ^ r
            for first in range(0, n, ROWS):
                i = first + tl.arange(0, ROWS)
                ci, si, _, _ = _rotation(a_ptr, i, r, n)
                a = c[None, :] * _row_turned(a_ptr, i, ci, si, j, r, n)
                a += s[None, :] * _row_turned(a_ptr, i, ci, si, partner, r, n)
                a = tl.where(i[:, None] == j[None, :], d[None, :], a)
                a = tl.where(i[:, None] == partner[None, :], 0.0, a)
                valid = (i < n)[:, None] & (j < n)[None, :]
                v = c[None, :] * _tile(v_ptr, i, j, n) + s[None, :] * _tile(v_ptr, i, partner, n)
                tl.store(next_a_ptr + i[:, None] * n + j[None, :], a, mask=valid)
                tl.store(next_v_ptr + i[:, None] * n + j[None, :], v, mask=valid)
            tl.debug_barrier()
            a_ptr, next_a_ptr = next_a_ptr, a_ptr
            v_ptr, next_v_ptr = next_v_ptr, v_ptr
        sweep += 1

    value = tl.load(a_ptr + j * n + j, mask=j < n, other=0.0)
    tl.store(values_ptr + problem * n + j, value * scale, mask=j < n)
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        tl.store(out_ptr + i[:, None] * n + j[None, :], _tile(v_ptr, i, j, n), mask=valid)


@triton.jit
def _tile(ptr, i, j, n):
    valid = (i < n)[:, None] & (j < n)[None, :]
    return tl.load(ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)


@triton.jit
def _row_turned(a_ptr, i, ci, si, j, r, n):
    return ci[:, None] * _tile(a_ptr, i, j, n) + si[:, None] * _tile(a_ptr, i ^ r, j, n)


@triton.jit
def _rotation(a_ptr, i, r, n):
    # Row i becomes c row_i + s row_(i ^ r), which zeroes the off-diagonal element of the pair.
    # Both rows of a pair compute the same c and opposite s. Returns c, s, the new diagonal and
    # the element that is zeroed; an element of 0 leaves its pair alone.
    partner = i ^ r
    both = (i < n) & (partner < n)
    own = tl.load(a_ptr + i * n + i, mask=i < n, other=0.0)
    other = tl.load(a_ptr + partner * n + partner, mask=both, other=0.0)
    off_ptr = a_ptr + tl.minimum(i, partner) * n + tl.maximum(i, partner)
    off = tl.load(off_ptr, mask=both, other=0.0)
    turns = off != 0.0
    cotangent = (other - own) / (2 * tl.where(turns, off, 1.0))
    positive = (cotangent > 0) | ((cotangent == 0) & (i < partner))
    tangent = 1 / (tl.abs(cotangent) + tl.sqrt(1 + cotangent * cotangent))
    tangent = tl.where(turns, tl.where(positive, tangent, -tangent), 0.0)
    c = 1 / tl.sqrt(1 + tangent * tangent)
    return c, -tangent * c, own - tangent * off, off
