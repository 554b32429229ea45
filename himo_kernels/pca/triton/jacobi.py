"""Jacobi rotations: the fallback of the eigensolver, which converges for every spectrum.

Plane rotations compute A = V L V^T, n / 2 disjoint pairs at a time: round r rotates the planes
(i, i ^ r), and the n - 1 rounds of a sweep visit every pair once. Rotations keep V orthonormal for
every spectrum. The last sweep is the first that finds all off-diagonal elements at rounding level.
"""

import triton
import triton.language as tl

SWEEPS = 24  # limit; convergence is quadratic after a few sweeps and takes 6 to 10

_EPS = tl.constexpr(2.0**-52)


@triton.jit
def solve_by_rotations(
    a_ptr,  # A [n, n], overwritten
    other_a_ptr,  # [n, n], scratch
    vectors_ptr,  # V^T [n, n], written
    other_vectors_ptr,  # [n, n], scratch
    values_ptr,  # [n], written
    n,
    SWEEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes unsorted eigenvalues, and eigenvectors as rows. A is symmetric up to rounding."""
    j = tl.arange(0, BLOCK)
    # A round reads one matrix and writes the other, so no thread overwrites data still being read.
    next_a_ptr, a_ptr = a_ptr, other_a_ptr
    v_ptr, next_v_ptr = vectors_ptr, other_vectors_ptr
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        a = 0.5 * tl.load(next_a_ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)
        a += 0.5 * tl.load(next_a_ptr + j[None, :] * n + i[:, None], mask=valid, other=0.0)
        tl.store(a_ptr + i[:, None] * n + j[None, :], a, mask=valid)
        identity = tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(tl.float64)
        tl.store(v_ptr + i[:, None] * n + j[None, :], identity, mask=valid)
    tl.debug_barrier()  # the code below reads what other threads wrote

    sweep = 0
    largest = tl.full([], 1.0, tl.float64)
    while (largest > _EPS) & (sweep < SWEEPS):
        largest = tl.full([], 0.0, tl.float64)
        for r in range(1, BLOCK):
            c, s, d, off = _rotation(a_ptr, j, r, n)
            largest = tl.maximum(largest, tl.max(tl.abs(off)))
            partner = j ^ r
            for first in range(0, n, ROWS):
                i = first + tl.arange(0, ROWS)
                ci, si, _, _ = _rotation(a_ptr, i, r, n)
                a = c[None, :] * _rows_rotated(a_ptr, i, ci, si, j, r, n)
                a += s[None, :] * _rows_rotated(a_ptr, i, ci, si, partner, r, n)
                a = tl.where(i[:, None] == j[None, :], d[None, :], a)
                a = tl.where(i[:, None] == partner[None, :], 0.0, a)
                v = _rows_rotated(v_ptr, i, ci, si, j, r, n)
                valid = (i < n)[:, None] & (j < n)[None, :]
                tl.store(next_a_ptr + i[:, None] * n + j[None, :], a, mask=valid)
                tl.store(next_v_ptr + i[:, None] * n + j[None, :], v, mask=valid)
            tl.debug_barrier()
            a_ptr, next_a_ptr = next_a_ptr, a_ptr
            v_ptr, next_v_ptr = next_v_ptr, v_ptr
        sweep += 1

    tl.store(values_ptr + j, tl.load(a_ptr + j * n + j, mask=j < n, other=0.0), mask=j < n)
    for first in range(0, n, ROWS):
        i = first + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        tl.store(vectors_ptr + i[:, None] * n + j[None, :], _tile(v_ptr, i, j, n), mask=valid)


@triton.jit
def _tile(ptr, i, j, n):
    valid = (i < n)[:, None] & (j < n)[None, :]
    return tl.load(ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)


@triton.jit
def _rows_rotated(a_ptr, i, ci, si, j, r, n):
    return ci[:, None] * _tile(a_ptr, i, j, n) + si[:, None] * _tile(a_ptr, i ^ r, j, n)


@triton.jit
def _rotation(a_ptr, i, r, n):
    # Row i becomes c row_i + s row_(i ^ r), which zeroes the off-diagonal element of the pair.
    # Both rows of a pair compute the same c and opposite s. Returns c, s, the new diagonal element
    # and the zeroed element. A pair whose element is already 0 is not rotated.
    partner = i ^ r
    both = (i < n) & (partner < n)
    own = tl.load(a_ptr + i * n + i, mask=i < n, other=0.0)
    other = tl.load(a_ptr + partner * n + partner, mask=both, other=0.0)
    off_ptr = a_ptr + tl.minimum(i, partner) * n + tl.maximum(i, partner)
    off = tl.load(off_ptr, mask=both, other=0.0)
    rotates = off != 0.0
    cotangent = (other - own) / (2 * tl.where(rotates, off, 1.0))
    positive = (cotangent > 0) | ((cotangent == 0) & (i < partner))
    tangent = 1 / (tl.abs(cotangent) + tl.sqrt(1 + cotangent * cotangent))
    tangent = tl.where(rotates, tl.where(positive, tangent, -tangent), 0.0)
    c = 1 / tl.sqrt(1 + tangent * tangent)
    return c, -tangent * c, own - tangent * off, off
