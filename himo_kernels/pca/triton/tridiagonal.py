"""Eigenvectors of small symmetric matrices through tridiagonal form: steps 1 to 4 of the solver.

See eigensolver.py. A kernel that sweeps a whole matrix runs one program per problem. The others run
one program per 16 eigenvalues or vectors.
"""

import triton
import triton.language as tl
from torch import Tensor

from himo_kernels import _triton

LANES = 16  # eigenvalues or vectors per program: n / 16 SMs share one matrix
ROWS = 32  # rows held in registers while a program sweeps one matrix
WARPS = 8  # warps of such a program: 16 elements per thread at a time
SECTIONS = 32  # points per bracket: with 16 lanes, four independent chains for each of 128 threads
SWEEPS = 11  # 33^11 > 2^53: brackets shrink to the width of a rounding error

_EPS = tl.constexpr(2.0**-52)
_SMALLEST_SCALE = tl.constexpr(2.0**-1000)


def approximate_eigenvectors(
    moment: Tensor,  # [P, n, n] float64
    scaled: Tensor,  # [P, n, n], matrices contiguous: written
    block: int,
) -> tuple[Tensor, Tensor]:
    """Returns nearly orthonormal rows [P, n, n], by descending eigenvalue, and scales [P].

    A scale is a power of two near the largest element, and scaled is the moment divided by it. If
    the matrix is not finite, its scale is NaN and scaled is 0. block is a power of two >= n.
    """
    problems, size, _ = moment.shape
    # Padded to the block, so that addresses are compile-time offsets from the first element.
    work, reflectors, vectors = moment.new_empty((3, problems, block, block))
    images = moment.new_empty((problems, 2, block))  # scratch shared by the threads of a program
    factors, diagonal, off_diagonal = moment.new_empty((3, problems, size))
    scale = moment.new_empty(problems)
    rows = min(ROWS, block)
    wide = {"num_warps": WARPS, "maxnreg": 255, "enable_fp_fusion": True}
    few = {"num_warps": 4, "maxnreg": 128, "enable_fp_fusion": True}
    _tridiagonalise_kernel[(problems,)](
        moment,
        scaled,
        work,
        reflectors,
        images,
        factors,
        diagonal,
        off_diagonal,
        scale,
        size,
        scaled.stride(0),
        ROWS=rows,
        BLOCK=block,
        **wide,
    )
    # The interpreter is faster with few programs and many lanes.
    lanes = block if _triton.INTERPRETED else LANES
    parts = problems * triton.cdiv(size, lanes)
    shifts = moment.new_empty((problems, size))
    _bisect_kernel[(parts,)](
        diagonal,
        off_diagonal,
        shifts,
        size,
        LANES=lanes,
        SECTIONS=SECTIONS,
        SWEEPS=SWEEPS,
        BLOCK=block,
        **few,
    )
    _inverse_iteration_kernel[(problems,)](
        diagonal,
        off_diagonal,
        shifts,
        vectors,
        moment.new_empty((problems, 4, size, size)),
        images,
        size,
        ROWS=rows,
        BLOCK=block,
        **wide,
    )
    _back_transform_kernel[(parts,)](
        vectors, reflectors, factors, size, COLUMNS=lanes, BLOCK=block, **few
    )
    return vectors[:, :size, :size], scale


@triton.jit
def _tridiagonalise_kernel(
    moment_ptr,  # [P, n, n]
    scaled_ptr,  # [P, n, n], matrices contiguous
    work_ptr,  # [P, BLOCK, BLOCK]: the matrix with all updates except the last
    reflectors_ptr,  # [P, BLOCK, BLOCK], row k holds v_k
    images_ptr,  # [P, 2, BLOCK]: A v and w, shared by threads
    factors_ptr,  # [P, n], 2 / v_k . v_k
    diagonal_ptr,  # [P, n]
    off_diagonal_ptr,  # [P, n], the last entry is undefined
    scale_ptr,  # [P], a power of two; NaN where the matrix is not finite
    n,
    scaled_stride_p,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    moment_ptr += problem * n * n
    scaled_ptr += problem * scaled_stride_p
    work_ptr += problem * BLOCK * BLOCK
    reflectors_ptr += problem * BLOCK * BLOCK
    images_ptr += problem * 2 * BLOCK
    scale = _scaled_copies(moment_ptr, scaled_ptr, work_ptr, n, ROWS, BLOCK)
    tl.store(scale_ptr + problem, scale)

    j = tl.arange(0, BLOCK)
    v = tl.zeros([BLOCK], tl.float64)  # the current matrix is A - v w^T - w v^T
    w = tl.zeros([BLOCK], tl.float64)
    tl.store(images_ptr + BLOCK + j, w)
    tl.debug_barrier()
    last_ptr = images_ptr + BLOCK  # where v is stored; initially zeros
    for k in range(0, n):
        row = tl.load(work_ptr + k * BLOCK + j)
        row -= tl.load(last_ptr + k) * w + tl.load(images_ptr + BLOCK + k) * v
        first = tl.sum(tl.where(j == k + 1, row, 0.0))
        rest = tl.sum(tl.where(j > k + 1, row * row, 0.0))
        reflects = rest > 0
        norm = tl.sqrt(first * first + rest)
        end = tl.where(reflects, tl.where(first > 0, -norm, norm), first)
        next_v = tl.where(j == k + 1, row - end, tl.where(j > k, row, 0.0))
        squares = tl.where(reflects, tl.sum(next_v * next_v), 1.0)
        factor = tl.where(reflects, 2.0 / squares, 0.0)
        tl.store(diagonal_ptr + problem * n + k, tl.sum(tl.where(j == k, row, 0.0)))
        tl.store(off_diagonal_ptr + problem * n + k, end)
        tl.store(factors_ptr + problem * n + k, factor)
        tl.store(reflectors_ptr + k * BLOCK + j, next_v)
        # One pass over the trailing matrix: the last update and the product with the reflector.
        for start in range((k + 1) // ROWS * ROWS, n, ROWS):
            i = start + tl.arange(0, ROWS)
            ptrs = work_ptr + i[:, None] * BLOCK + j[None, :]
            left = (j > k)[None, :] & (i > k)[:, None]
            a = tl.load(ptrs, mask=left, other=0.0)
            a -= tl.load(last_ptr + i)[:, None] * w[None, :]
            a -= tl.load(images_ptr + BLOCK + i)[:, None] * v[None, :]
            tl.store(ptrs, a, mask=left)
            tl.store(images_ptr + i, factor * tl.sum(a * next_v[None, :], axis=1))
        tl.debug_barrier()  # the code below reads what other threads wrote
        image = tl.load(images_ptr + j, mask=(j > k) & (j < n), other=0.0)
        v = next_v
        w = image - (0.5 * factor * tl.sum(v * image)) * v
        tl.store(images_ptr + BLOCK + j, w)
        last_ptr = reflectors_ptr + k * BLOCK
        tl.debug_barrier()


@triton.jit
def _scaled_copies(moment_ptr, scaled_ptr, work_ptr, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    # Divides the matrix by a power of two near its largest element, which is exact and keeps
    # squares in range. Writes the result to both outputs and returns the power; writes zeros and
    # returns NaN if the matrix is not finite.
    j = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float64)
    infinite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        size = tl.abs(tl.load(moment_ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0))
        infinite += tl.sum(tl.where(size < float("inf"), 0, 1), axis=0)
        largest = tl.maximum(largest, tl.max(size, axis=0))
    finite = tl.sum(infinite) == 0
    exponent = tl.max(largest).to(tl.int64, bitcast=True) & 0x7FF0000000000000
    scale = exponent.to(tl.float64, bitcast=True)
    scale = tl.where(finite & (scale > _SMALLEST_SCALE), scale, 1.0)
    for start in range(0, BLOCK, ROWS):
        i = start + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        a = tl.load(moment_ptr + i[:, None] * n + j[None, :], mask=valid, other=0.0)
        a = tl.where(finite, a * (1 / scale), 0.0)
        tl.store(work_ptr + i[:, None] * BLOCK + j[None, :], a)
        tl.store(scaled_ptr + i[:, None] * n + j[None, :], a, mask=valid)
    return tl.where(finite, scale, float("nan"))


@triton.jit
def _bisect_kernel(
    diagonal_ptr,  # [P, n]
    off_diagonal_ptr,  # [P, n], the last entry is not read
    shifts_ptr,  # [P, n]: eigenvalues, descending
    n,
    LANES: tl.constexpr,
    SECTIONS: tl.constexpr,
    SWEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(n, LANES)
    problem = (tl.program_id(0) // parts).to(tl.int64)
    lanes = tl.program_id(0) % parts * LANES + tl.arange(0, LANES)
    d_ptr = diagonal_ptr + problem * n
    e_ptr = off_diagonal_ptr + problem * n
    rows = tl.arange(0, BLOCK)
    right = tl.load(e_ptr + rows, mask=rows < n - 1, other=0.0)
    left = tl.load(e_ptr + rows - 1, mask=(rows > 0) & (rows < n), other=0.0)
    middle = tl.load(d_ptr + rows, mask=rows < n, other=0.0)
    bound = tl.max(tl.abs(middle) + tl.abs(left) + tl.abs(right))  # Gershgorin bound
    bound = tl.maximum(bound * (1 + 8 * _EPS), 1.0)
    low = tl.zeros([LANES], tl.float64) - bound
    width = 2 * bound
    share = (tl.arange(0, SECTIONS) + 1).to(tl.float64) / (SECTIONS + 1)
    least = bound * _EPS * _EPS  # smallest pivot: bounds the quotient, far below rounding of T
    for _ in range(SWEEPS):
        x = low[:, None] + (width * share)[None, :]
        count = tl.zeros([LANES, SECTIONS], tl.int32)  # eigenvalues below x: negative pivots
        pivot = tl.full([LANES, SECTIONS], 1.0, tl.float64)
        square = bound * 0.0
        for i in range(0, n):
            pivot = (tl.load(d_ptr + i) - x) - square / pivot
            pivot = tl.where(tl.abs(pivot) < least, -least, pivot)
            count += (pivot < 0).to(tl.int32)
            e = tl.load(e_ptr + i, mask=i < n - 1, other=0.0)
            square = e * e
        passed = tl.sum((count <= (n - 1 - lanes)[:, None]).to(tl.int32), axis=1)
        low += width * (passed.to(tl.float64) / (SECTIONS + 1))
        width = width / (SECTIONS + 1)
    tl.store(shifts_ptr + problem * n + lanes, low + 0.5 * width, mask=lanes < n)


@triton.jit
def _inverse_iteration_kernel(
    diagonal_ptr,  # [P, n]
    off_diagonal_ptr,  # [P, n], the last entry is not read
    shifts_ptr,  # [P, n]
    vectors_ptr,  # [P, BLOCK, BLOCK], as rows
    eliminated_ptr,  # [P, 4, n, n], scratch of _solve
    overlaps_ptr,  # [P, 2, BLOCK], scratch of _orthonormalise
    n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program for all vectors: a step takes the latency of a division for any number of lanes.
    problem = tl.program_id(0).to(tl.int64)
    diagonal_ptr += problem * n
    off_diagonal_ptr += problem * n
    shifts_ptr += problem * n
    vectors_ptr += problem * BLOCK * BLOCK
    eliminated_ptr += problem * 4 * n * n
    overlaps_ptr += problem * 2 * BLOCK
    for step in tl.static_range(2):
        _solve(
            diagonal_ptr, off_diagonal_ptr, shifts_ptr, vectors_ptr, eliminated_ptr, n, step, BLOCK
        )
        tl.debug_barrier()  # the code below reads what other threads wrote
        _orthonormalise(vectors_ptr, overlaps_ptr, n, ROWS, BLOCK)
        tl.debug_barrier()


@triton.jit
def _solve(
    d_ptr,  # [n]
    e_ptr,  # [n], the last entry is not read
    shifts_ptr,  # [n]
    vectors_ptr,  # [BLOCK, BLOCK], as rows, in place
    u_ptr,  # [4, n, n]: the three diagonals of U and the right-hand side, as rows
    n,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Row l becomes the solution of (T - shift_l) x = row l; at step 0, row l is random.
    lanes = tl.arange(0, BLOCK)
    inside = lanes < n
    x_ptr = vectors_ptr + lanes * BLOCK
    u_ptr += lanes
    plane = n * n
    shift = tl.load(shifts_ptr + lanes, mask=inside, other=0.0)

    p0 = tl.load(d_ptr) - shift  # row i of T - shift, at columns i and i + 1
    p1 = tl.load(e_ptr, mask=n > 1, other=0.0) + tl.zeros_like(shift)
    rhs = _right_hand_side(x_ptr, lanes, 0, inside, STEP)
    for i in range(0, n - 1):
        e = tl.load(e_ptr + i)
        next_d = tl.load(d_ptr + i + 1) - shift
        next_e = tl.load(e_ptr + i + 1, mask=i < n - 2, other=0.0)
        next_rhs = _right_hand_side(x_ptr, lanes, i + 1, inside, STEP)
        swap = tl.abs(p0) < tl.abs(e)
        u0 = tl.where(swap, e, p0)
        u0 = tl.where(tl.abs(u0) < _EPS, _EPS, u0)  # the matrix is scaled so that |T| >= 1
        u1 = tl.where(swap, next_d, p1)
        u2 = tl.where(swap, next_e, 0.0)
        y = tl.where(swap, next_rhs, rhs)
        ratio = tl.where(swap, p0, e) / u0
        p0 = tl.where(swap, p1, next_d) - ratio * u1
        p1 = tl.where(swap, 0.0, next_e) - ratio * u2
        rhs = tl.where(swap, rhs, next_rhs) - ratio * y
        tl.store(u_ptr + i * n, u0, mask=inside)
        tl.store(u_ptr + plane + i * n, u1, mask=inside)
        tl.store(u_ptr + 2 * plane + i * n, u2, mask=inside)
        tl.store(u_ptr + 3 * plane + i * n, y, mask=inside)
    tl.debug_barrier()  # the code below reads what other threads wrote

    x1 = rhs / tl.where(tl.abs(p0) < _EPS, _EPS, p0)
    x2 = tl.zeros_like(x1)
    tl.store(x_ptr + n - 1, x1, mask=inside)
    for step in range(0, n - 1):
        i = n - 2 - step
        y = tl.load(u_ptr + 3 * plane + i * n, mask=inside, other=0.0)
        y -= tl.load(u_ptr + plane + i * n, mask=inside, other=0.0) * x1
        y -= tl.load(u_ptr + 2 * plane + i * n, mask=inside, other=0.0) * x2
        x2 = x1
        x1 = y / tl.load(u_ptr + i * n, mask=inside, other=1.0)
        tl.store(x_ptr + i, x1, mask=inside)


@triton.jit
def _right_hand_side(x_ptr, lanes, i, inside, STEP: tl.constexpr):
    if STEP == 0:
        # Any start that differs between lanes works: hash both indices.
        bits = (lanes * 1024 + i).to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        return (bits ^ (bits >> 16)).to(tl.float64) * 2.0**-32 - 0.5
    else:
        return tl.load(x_ptr + i, mask=inside, other=0.0)


@triton.jit
def _orthonormalise(
    vectors_ptr,  # [BLOCK, BLOCK], as rows, in place
    overlaps_ptr,  # [2, BLOCK]: dot products with the last finished vector, double-buffered
    n,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j = tl.arange(0, BLOCK)
    for start in range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)
        valid = (i < n)[:, None] & (j < n)[None, :]
        z = tl.load(vectors_ptr + i[:, None] * BLOCK + j[None, :], mask=valid, other=0.0)
        largest = tl.max(tl.abs(z), axis=1)  # scale first: squares of the solutions may overflow
        z *= (1 / tl.where(largest > 0, largest, 1.0))[:, None]
        z *= (1 / tl.sqrt(tl.where(largest > 0, tl.sum(z * z, axis=1), 1.0)))[:, None]
        tl.store(vectors_ptr + i[:, None] * BLOCK + j[None, :], z)
    tl.store(overlaps_ptr + j, tl.zeros([BLOCK], tl.float64))
    tl.debug_barrier()

    q = tl.zeros([BLOCK], tl.float64)  # overlap times q is still to be subtracted from later rows
    for k in range(0, n):
        last_ptr = overlaps_ptr + k % 2 * BLOCK
        next_ptr = overlaps_ptr + (k + 1) % 2 * BLOCK
        row = tl.load(vectors_ptr + k * BLOCK + j) - tl.load(last_ptr + k) * q
        next_q = row * (1 / tl.sqrt(tl.sum(row * row)))
        # One pass over the later rows: subtract q and compute the overlap with the next vector.
        for start in range((k + 1) // ROWS * ROWS, n, ROWS):
            i = start + tl.arange(0, ROWS)
            ptrs = vectors_ptr + i[:, None] * BLOCK + j[None, :]
            later = ((i > k) & (i < n))[:, None] & (j < n)[None, :]
            z = tl.load(ptrs, mask=later, other=0.0) - tl.load(last_ptr + i)[:, None] * q[None, :]
            tl.store(ptrs, z, mask=later)
            tl.store(next_ptr + i, tl.sum(z * next_q[None, :], axis=1))
        tl.debug_barrier()  # the code below reads what other threads wrote
        tl.store(vectors_ptr + k * BLOCK + j, next_q)
        q = next_q


@triton.jit
def _back_transform_kernel(
    vectors_ptr,  # [P, BLOCK, BLOCK], as rows, in place
    reflectors_ptr,  # [P, BLOCK, BLOCK]
    factors_ptr,  # [P, n]
    n,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(n, COLUMNS)
    problem = (tl.program_id(0) // parts).to(tl.int64)
    columns = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, BLOCK)
    valid = (rows < n)[:, None] & (columns < n)[None, :]
    ptrs = vectors_ptr + problem * BLOCK * BLOCK + columns[None, :] * BLOCK + rows[:, None]
    z = tl.load(ptrs, mask=valid, other=0.0)
    for step in range(0, n - 2):
        k = n - 3 - step
        v = tl.load(reflectors_ptr + (problem * BLOCK + k) * BLOCK + rows)
        factor = tl.load(factors_ptr + problem * n + k)
        z -= (factor * v)[:, None] * tl.sum(v[:, None] * z, axis=0)[None, :]
    tl.store(ptrs, z, mask=valid)
