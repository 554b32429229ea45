"""The low-rank branch: its factors, and matrix products bounded by a rank on the device.

torch.bmm reads all columns of its operands, whatever the rank. In bounded_product a block past the
rank only stores zeros, and inner loops end at the rank. All other products are torch's. The bounded
dimension is a multiple of 16, and the operands are zero past the rank.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import dot, rounded
from himo_kernels.info_nce.compose import Factors
from himo_kernels.info_nce.triton.logits import Branch, padded, up_to_rank
from himo_kernels.info_nce.triton.tiles import Tile, precision_for, product_tile_for

# Number of terms that represent X: 24 bits of float32, 22 bits, exact.
_TERMS = {torch.bfloat16: 3, torch.float16: 2, torch.float32: 1}


@dataclass(frozen=True)
class MaskedFactors:
    """V, and C and B of component_features = C B with zeros past the rank; padded."""

    image: Tensor  # [B, N, W of D]
    coefficients: Tensor  # [B, N, W]
    basis: Tensor  # [B, W, W of D]
    rank: Tensor  # [B] int64, in [0, W]


def masked_factors(
    image: Tensor,  # [*, N, D]
    factors: Factors,
) -> MaskedFactors:
    """Returns the factors with zeros past the rank, where they may be uninitialised."""
    coefficients, basis = padded(factors.coefficients), padded(factors.basis, rows=True)
    rank = factors.rank.reshape(-1).clamp(0, coefficients.shape[-1])
    used = torch.arange(coefficients.shape[-1], device=rank.device) < rank[:, None]  # [B, W]
    return MaskedFactors(
        padded(image),
        torch.where(used[:, None, :], coefficients, 0.0),
        torch.where(used[:, :, None], basis, 0.0),
        rank,
    )


def factors_branch(factors: MaskedFactors, scale: Tensor) -> Branch:
    """Returns the branch of images against coefficients @ basis, with X = V B^T and Y = C.

    V (C B)^T = (V B^T) C^T, whose inner dimension is the rank. One 16-bit number for V B^T would
    make the logits inaccurate, so it is a sum of 16-bit terms. In float16, V B^T must stay below
    65504.
    """
    dtype, shape = factors.image.dtype, factors.coefficients.shape
    left = torch.empty((_TERMS[dtype], *shape), dtype=dtype, device=factors.image.device)
    bounded_product(factors.image, factors.basis.mT, factors.rank, "columns", left)
    return Branch(left, factors.coefficients, scale, factors.rank)


def bounded_product(
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, K, L], dtype of x, or a narrower dtype if x is float32
    rank: Tensor,  # [B] int64, between 0 and the bounded dimension
    bound: str,  # "rows", "columns" or "inner"
    out: Tensor,  # [B, M, L], or [TERMS, B, M, L] as a sum of terms; last dimension contiguous
    *,
    accumulate: bool = False,
) -> None:
    """Writes x @ y to out, or adds it to out; the rank of each problem bounds M, L or K."""
    parts = out if out.dim() == 4 else out.unsqueeze(0)
    terms, problems, rows, columns = parts.shape
    tile: Tile = product_tile_for(x)
    grid = (problems * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)
    # float32 times 16-bit features: three TF32 products give 22 bits, on the tensor cores.
    mixed = x.dtype == torch.float32 and y.dtype != torch.float32
    bounded_product_kernel[grid](
        x,
        y,
        parts,
        rank,
        rows,
        columns,
        x.shape[-1],
        *x.stride(),
        *y.stride(),
        *parts.stride()[:3],
        BOUND=bound,
        TERMS=terms,
        ACCUMULATE=accumulate,
        PRECISION="tf32x3" if mixed else precision_for(x.dtype),
        **tile.constants(),
    )


@triton.jit
def bounded_product_kernel(
    x_ptr,  # [B, rows, inner], any strides
    y_ptr,  # [B, inner, columns], any strides
    out_ptr,  # [TERMS, B, rows, columns], columns contiguous
    rank_ptr,  # [B] int64
    rows,
    columns,
    inner,
    x_problem_stride,
    x_row_stride,
    x_inner_stride,
    y_problem_stride,
    y_inner_stride,
    y_column_stride,
    out_term_stride,
    out_problem_stride,
    out_row_stride,
    BOUND: tl.constexpr,  # "rows", "columns" or "inner": the dimension that ends at the rank
    TERMS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds X Y, with zeros past the rank, to out, or writes it to out as a sum of TERMS terms.

    Multiplies in the dtype of X. Each term is the remainder after the earlier terms, rounded to the
    dtype of out; three bfloat16 terms hold 24 bits.
    """
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    row_block = tl.program_id(0) % row_blocks
    column_block = (tl.program_id(0) // row_blocks) % column_blocks
    problem = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    row_limit, column_limit, inner_limit = rows, columns, inner
    if BOUND == "rows":
        row_limit = up_to_rank(rank_ptr, problem, rows)
    if BOUND == "columns":
        column_limit = up_to_rank(rank_ptr, problem, columns)
    if BOUND == "inner":
        inner_limit = up_to_rank(rank_ptr, problem, inner)

    first_row = (row_block * BLOCK_ROWS).to(tl.int64)
    first_column = (column_block * BLOCK_COLUMNS).to(tl.int64)
    in_row, in_column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    depth = tl.arange(0, BLOCK_INNER)
    x_ptr += problem * x_problem_stride + first_row * x_row_stride
    y_ptr += problem * y_problem_stride + first_column * y_column_stride
    x_at = in_row[:, None] * x_row_stride + depth[None, :] * x_inner_stride
    y_at = depth[:, None] * y_inner_stride + in_column[None, :] * y_column_stride
    row_mask = first_row + in_row < row_limit
    column_mask = first_column + in_column < column_limit
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if (first_row < row_limit) & (first_column < column_limit):
        for start in range(0, inner_limit, BLOCK_INNER):
            in_bounds = start + depth < inner_limit
            x = tl.load(x_ptr + x_at, mask=row_mask[:, None] & in_bounds[None, :], other=0.0)
            y = tl.load(y_ptr + y_at, mask=in_bounds[:, None] & column_mask[None, :], other=0.0)
            if x_ptr.dtype.element_ty == tl.float32:
                y = y.to(tl.float32)
            accumulator = dot(x, y, accumulator, PRECISION)
            x_ptr += tl.cast(BLOCK_INNER, tl.int64) * x_inner_stride
            y_ptr += tl.cast(BLOCK_INNER, tl.int64) * y_inner_stride

    out_ptr += problem * out_problem_stride + first_row * out_row_stride + first_column
    out_at = in_row[:, None] * out_row_stride + in_column[None, :]
    inside = (first_row + in_row < rows)[:, None] & (first_column + in_column < columns)[None, :]
    if ACCUMULATE:
        accumulator += tl.load(out_ptr + out_at, mask=inside, other=0.0)
    for term in tl.static_range(TERMS):
        part = rounded(accumulator, out_ptr.dtype.element_ty)
        tl.store(out_ptr + term * tl.cast(out_term_stride, tl.int64) + out_at, part, mask=inside)
        accumulator -= part.to(tl.float32)
