"""The matrix product of centred moments and projections.

Operands may have any strides and dtype and are converted to the dtype of the sums as they are
loaded. A mean can be subtracted from an operand then, so that no centred copy exists. Rows, columns
or the inner dimension may end at the rank, which only the device knows: programs past it return at
once, and the loop over the inner dimension stops there.

float64 products use the float64 tensor cores of sm_80 and later. A float32 product is computed as
three TF32 products, which keeps float32 accuracy; plain TF32 is never used.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels import _triton

# A program holds 64 x 64 sums, 64 registers per thread in float64. Chosen from compiler output (no
# spills, two programs per SM); not yet measured on hardware.
BLOCK = 64
BLOCK_INNER = 16
WARPS = 4
WARPS_RAGGED = 8  # ragged shapes need registers for an address and a mask per element
PROGRAMS = 264  # target of splitting the inner dimension: two programs per SM of an H100
LEAST_SPLIT = 256  # minimum inner elements per split: partial sums must cost less than they save
SYMMETRIC_FROM = 4  # minimum tiles per side for which computing only the lower half pays off


@triton.jit
def _raised(values, SUMS: tl.constexpr):
    if values.dtype == tl.bfloat16:
        values = values.to(tl.float32)  # Triton's interpreter has no bfloat16 -> float64
    return values.to(SUMS)


@triton.jit
def _tiles(a_ptrs, b_ptrs, first_k, k, m_valid, n_valid, inner, a_stride_k, b_stride_k):
    k_valid = first_k + k < inner
    a_valid = m_valid[:, None] & k_valid[None, :]
    b_valid = k_valid[:, None] & n_valid[None, :]
    a = tl.load(a_ptrs + first_k * a_stride_k, mask=a_valid, other=0.0)
    return a, tl.load(b_ptrs + first_k * b_stride_k, mask=b_valid, other=0.0)


@triton.jit
def _end(length, limit_ptr, LIMITED: tl.constexpr, OF: tl.constexpr):
    # The end of a dimension of this length, which the device may limit.
    if LIMITED == OF:
        length = tl.minimum(tl.load(limit_ptr), length)
    return length


@triton.jit
def _centred(
    tile,
    means,
    at,  # indices of the inner dimension
    end,  # of the inner dimension
    index,  # of the other dimension
    valid,
    MEAN: tl.constexpr,  # "inner", "none", or the other dimension
    INNER: tl.constexpr,  # axis of the inner dimension
):
    """Returns the tile minus its mean, and 0 past the end of the inner dimension."""
    inside = at < end
    if MEAN == "inner":
        mean = tl.load(means + at, mask=inside, other=0.0).to(tile.dtype)
        tile -= tl.expand_dims(mean, 1 - INNER)
    elif MEAN != "none":
        mean = tl.load(means + index, mask=valid, other=0.0).to(tile.dtype)
        tile -= tl.expand_dims(mean, INNER)
    return tl.where(tl.expand_dims(inside, 1 - INNER), tile, 0.0)


@triton.jit
def _store(out_ptr, sums, m, n, columns, valid, SYMMETRIC: tl.constexpr):
    # Of a symmetric product, the lower half and its mirror image above the diagonal: every element
    # once, also on the tiles of the diagonal.
    if out_ptr.dtype.element_ty == tl.bfloat16:
        sums = sums.to(tl.float32)
    lower = valid & (n[None, :] <= m[:, None]) if SYMMETRIC else valid
    tl.store(out_ptr + m[:, None] * columns + n[None, :], sums, mask=lower)
    if SYMMETRIC:
        above = valid & (n[None, :] < m[:, None])
        tl.store(out_ptr + n[None, :] * columns + m[:, None], sums, mask=above)


@triton.jit
def _matmul_kernel(
    out_ptr,  # [splits, P, M, N], matrices contiguous
    a_ptr,  # [P, M, K]
    b_ptr,  # [P, K, N]
    mean_ptr,  # [P, mean_length]
    add_ptr,  # [P, M, N]
    limit_ptr,  # [P] int64
    problems,
    rows,
    columns,
    inner,
    inner_per_split,
    mean_length,
    out_stride_p,
    a_stride_p,
    a_stride_m,
    a_stride_k,
    b_stride_p,
    b_stride_k,
    b_stride_n,
    add_stride_p,
    add_stride_m,
    add_stride_n,
    A_MEAN: tl.constexpr,  # dimension of a that its mean is indexed by: "rows", "inner" or "none"
    B_MEAN: tl.constexpr,  # dimension of b that its mean is indexed by: "inner", "columns", "none"
    LIMITED: tl.constexpr,  # what ends at limit: "rows", "columns", "inner", "add" or "none"
    ADD: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(columns, BLOCK_N)
    tiles = tl.cdiv(rows, BLOCK_M) * tiles_n
    tile = tl.program_id(0) % tiles
    slot = (tl.program_id(0) // tiles).to(tl.int64)  # split * problems + problem
    problem = slot % problems
    start = (slot // problems) * inner_per_split
    end = tl.minimum(start + inner_per_split, inner)
    first_m = (tile // tiles_n) * BLOCK_M
    first_n = (tile % tiles_n) * BLOCK_N
    if SYMMETRIC:
        if first_n > first_m:
            return  # written by the program of the transposed tile
    # int64: a matrix may hold more than 2^31 elements.
    m = (first_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_valid, n_valid = m < rows, n < columns
    limit_ptr += problem
    m_end = _end(rows, limit_ptr, LIMITED, "rows")
    n_end = _end(columns, limit_ptr, LIMITED, "columns")
    end = _end(end, limit_ptr, LIMITED, "inner")
    if (first_m >= m_end) | (first_n >= n_end):
        return

    a_ptrs = a_ptr + problem * a_stride_p + m[:, None] * a_stride_m + k[None, :] * a_stride_k
    b_ptrs = b_ptr + problem * b_stride_p + k[:, None] * b_stride_k + n[None, :] * b_stride_n
    means = mean_ptr + problem * mean_length
    sums = tl.zeros([BLOCK_M, BLOCK_N], SUMS)
    # Tiles are prefetched by one step and converted only when used: Triton 3.6 cannot multiply
    # float64 operands that it can trace to loads of a narrower dtype. Loads are masked by inner
    # instead of end: a bound that is not a multiple of 16 would prevent vectorised loads.
    next_a, next_b = _tiles(
        a_ptrs, b_ptrs, start, k, m_valid, n_valid, inner, a_stride_k, b_stride_k
    )
    for first_k in range(start, end, BLOCK_K):
        at = first_k + k
        a, b = _raised(next_a, SUMS), _raised(next_b, SUMS)
        next_k = first_k + BLOCK_K
        next_a, next_b = _tiles(
            a_ptrs, b_ptrs, next_k, k, m_valid, n_valid, inner, a_stride_k, b_stride_k
        )
        a = _centred(a, means, at, end, m, m_valid, A_MEAN, 1)
        b = _centred(b, means, at, end, n, n_valid, B_MEAN, 0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=SUMS)

    valid = (m < m_end)[:, None] & (n < n_end)[None, :]
    if ALPHA != 1.0:
        sums *= ALPHA
    if ADD:
        add_ptrs = add_ptr + problem * add_stride_p
        add_ptrs += m[:, None] * add_stride_m + n[None, :] * add_stride_n
        added = valid & (m < _end(rows, limit_ptr, LIMITED, "add"))[:, None]
        sums += BETA * _raised(tl.load(add_ptrs, mask=added, other=0.0), SUMS)
    _store(out_ptr + slot * out_stride_p, sums, m, n, columns, valid, SYMMETRIC)


def flat(tensor: Tensor, dims: int = 2) -> Tensor:
    """Flattens all but the last dims dimensions into one, the problems.

    Copies only if the result cannot be expressed as a view.
    """
    (*batch,) = tensor.shape[: tensor.dim() - dims]
    return tensor.reshape(math.prod(batch), *tensor.shape[tensor.dim() - dims :])


def matmul(
    a: Tensor,  # [P, M, K]
    b: Tensor,  # [P, K, N]
    sums: torch.dtype,
    *,
    mean: Tensor | None = None,  # [P, length of the dimensions that a_mean and b_mean name]
    a_mean: str = "none",
    b_mean: str = "none",
    limited: str = "none",
    limit: Tensor | None = None,  # [P] int64
    add: Tensor | None = None,  # broadcasts to [P, M, N]
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: bool = False,
    out: Tensor | None = None,  # [P, M, N], matrices contiguous; its dtype rounds the sums once
) -> Tensor:
    """Returns alpha (a - mean) @ (b - mean) + beta add [P, M, N], summed in float32 or float64.

    a_mean names the dimension of a that the mean is indexed by ("rows" or "inner"), b_mean the one
    of b ("inner" or "columns"). limited="inner" ends the sum at limit. "rows" or "columns" writes
    nothing at and past limit: the caller must not read it or must pass an out filled with zeros.
    "add" adds only the rows of add before limit. alpha and beta are compile-time constants.
    symmetric=True declares the product symmetric; both halves are then bitwise equal.
    """
    problems, rows, inner = a.shape
    columns = b.shape[-1]
    # The kernel assumes contiguous mean and limit, which may be strided or expanded.
    mean = None if mean is None else mean.contiguous()
    limit = None if limit is None else limit.contiguous()
    tiles = triton.cdiv(rows, BLOCK) * triton.cdiv(columns, BLOCK)
    if problems == 0:
        return a.new_empty((problems, rows, columns), dtype=sums) if out is None else out
    # The number of splits depends only on shapes: sums are the same on every device and run.
    splits = 1
    if limited == "none" and add is None and alpha == 1:
        splits = min(triton.cdiv(PROGRAMS, tiles * problems), triton.cdiv(inner, LEAST_SPLIT))
    inner_per_split = triton.cdiv(triton.cdiv(inner, splits), BLOCK_INNER) * BLOCK_INNER
    splits = triton.cdiv(inner, inner_per_split)
    # The interpreter truncates to bfloat16 instead of rounding: store in sums, then convert.
    truncates = _triton.INTERPRETED and out is not None and out.dtype == torch.bfloat16
    if splits > 1 or out is None or truncates:
        result = a.new_empty((splits * problems, rows, columns), dtype=sums)
    else:
        result = out
    added = result if add is None else add.expand((problems, rows, columns))
    lengths = (rows, columns, inner, *a.stride(), *b.stride())
    ragged = any(length % 16 for length in lengths if length != 1)
    options: dict[str, Any] = {
        "num_warps": WARPS_RAGGED if ragged else WARPS,
        "maxnreg": 255,  # otherwise ptxas spills registers to fit more programs on an SM
        "num_stages": 1,  # the kernel prefetches explicitly
        "enable_fp_fusion": True,
    }
    _matmul_kernel[(splits * problems * tiles,)](
        result,
        a,
        b,
        a if mean is None else mean,
        added,
        a if limit is None else limit,
        problems,
        rows,
        columns,
        inner,
        inner_per_split,
        0 if mean is None else mean.shape[-1],
        result.stride(0),
        *a.stride(),
        *b.stride(),
        *added.stride(),
        A_MEAN=a_mean,
        B_MEAN=b_mean,
        LIMITED=limited,
        ADD=add is not None,
        ALPHA=alpha,
        BETA=beta,
        SYMMETRIC=symmetric and triton.cdiv(rows, BLOCK) >= SYMMETRIC_FROM,
        SUMS=tl.float64 if sums == torch.float64 else tl.float32,
        PRECISION="ieee" if sums == torch.float64 else "tf32x3",
        BLOCK_M=BLOCK,
        BLOCK_N=BLOCK,
        BLOCK_K=BLOCK_INNER,
        **options,
    )
    if splits > 1:
        result = result.view(splits, problems, rows, columns).sum(0)
    return result if out is None or result is out else out.copy_(result)
