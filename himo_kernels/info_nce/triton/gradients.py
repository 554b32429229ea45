"""Pass 2, from dS to the gradients: matrix products, and epilogues that add the positives.

No value is read on the host, so a CUDA graph can capture all launches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import COUNTS, rounded
from himo_kernels.info_nce.compose import Direction, Settings, Statistics
from himo_kernels.info_nce.triton.grad_logits import (
    Chunk,
    GradLogits,
    grad_positive,
    in_chunks,
    positives_of,
)
from himo_kernels.info_nce.triton.logits import Branch
from himo_kernels.info_nce.triton.low_rank import bounded_product
from himo_kernels.info_nce.triton.tiles import FUSED

_GRADIENT = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 4, **FUSED}
_SCALE = {"BLOCK": 4096, "num_warps": 8, **FUSED}


@dataclass(frozen=True)
class Needs:
    """Which gradients pass 2 computes."""

    left: bool = False  # of X
    left_keys: bool = False  # of X as the key: only the column part if keys are constants
    right: bool = False  # of Y
    scale: bool = False


@dataclass(frozen=True)
class Gradients:
    """The requested gradients; None if not requested."""

    left: Tensor | None = None  # [B, M, W], float32 unless left_dtype says otherwise
    left_keys: Tensor | None = None  # [B, M, W] float32
    right: Tensor | None = None  # [B, N, W], in the dtype of Y
    scale: Tensor | None = None  # [] float32


def gradients(
    branch: Branch,
    statistics: Statistics,
    settings: Settings,
    needs: Needs,
    *,
    add_to: Gradients = Gradients(),
    left_dtype: torch.dtype = torch.float32,
) -> Gradients:
    """Returns the gradients of X, Y and s of a whole batch: eq. (6) and (7).

    The gradients of X and s include the gradients of an earlier loss, passed as float32 in add_to.
    """
    if needs == Needs():
        return Gradients()
    shape, samples = branch.right.shape, branch.columns
    positives = positives_of(branch)
    rows, columns = (
        Direction(positives, nll.reshape(-1, samples).contiguous())
        for nll in (statistics.row_nll, statistics.column_nll)
    )
    scale_partials = None
    if needs.scale:
        scale_partials = branch.new_empty(branch.problems, branch.row_blocks, branch.column_tiles)
    pass_2 = _Pass2(
        GradLogits(branch, rows, columns, settings, samples, scale_partials),
        multiplier=statistics.grad_loss.reshape(-1).float().contiguous(),
        divisor=2 * samples,
        scale=branch.scale,
    )
    # If keys are differentiated, left and left_keys are the same gradient.
    one_left = needs.left_keys and settings.differentiate_keys
    left = left_keys = right = None
    if needs.left or one_left:
        in_place = add_to.left is not None and left_dtype == torch.float32
        left = add_to.left if in_place else branch.new_empty(*shape, dtype=left_dtype)
    if needs.left_keys and not one_left:
        left_keys = branch.new_empty(*shape)
    if needs.right:
        right = branch.new_empty(*shape, dtype=branch.right.dtype)
    pass_2.write(left, left_keys, right, add_to.left)
    scale = None
    if scale_partials is not None:
        scale = _scale_gradient(scale_partials, pass_2.multiplier, pass_2.divisor, add_to.scale)
    return Gradients(left if needs.left else None, left if one_left else left_keys, right, scale)


def block_gradients(
    branch: Branch,  # of one problem
    rows: Direction,
    columns: Direction,
    multiplier: Tensor,  # [1]: multiplies the weights of both directions
    settings: Settings,
    total: int,  # samples of the batch
) -> tuple[Tensor, Tensor]:
    """Returns the gradients [1, M, W] of X and [1, N, W] of Y, float32, without the factor s."""
    pass_2 = _Pass2(GradLogits(branch, rows, columns, settings, total), multiplier)
    left, right = branch.new_empty(*branch.left.shape[1:]), branch.new_empty(*branch.right.shape)
    pass_2.write(left, None, right, None)
    return left, right


@dataclass(frozen=True)
class _Pass2:
    """The products with 2 N dS of one loss, or of a block of it."""

    grad_logits: GradLogits
    multiplier: Tensor  # [B] float32: all gradients are scaled by multiplier / divisor
    divisor: int = 1
    scale: Tensor | None = None  # s, if the gradients of X and Y include it

    def write(
        self,
        left: Tensor | None,  # [B, M, W]: of X
        left_keys: Tensor | None,  # [B, M, W]: of X as the key, from the column part
        right: Tensor | None,  # [B, N, W]: of Y
        add_to_left: Tensor | None,  # [B, M, W]
    ) -> None:
        """Writes those gradients that are not None."""
        branch = self.grad_logits.branch
        rows, columns = self.grad_logits.rows, self.grad_logits.columns
        parts = 1 if self.grad_logits.settings.differentiate_keys else 2
        if left is left_keys is right is None:
            parts = 0
        products = None
        if right is not None:
            in_place = right.dtype == torch.float32
            products = right if in_place else branch.new_empty(*right.shape)
        x = branch.left[0]  # the first term is X rounded to 16 bits, enough for a 16-bit dS
        if self.grad_logits.dtype == torch.float32 and branch.left.shape[0] > 1:
            x = branch.left.sum(0, dtype=torch.float32)
        for chunk, grad_rows, grad_columns in self.grad_logits.chunks(parts):
            for grad, to, own, pair, add in (
                (grad_rows, left, rows, columns, add_to_left),
                (grad_columns, left_keys, columns, rows, None),
            ):
                if to is not None:
                    product = branch.new_empty(*grad.shape[:2], to.shape[-1])
                    multiply(branch, grad, branch.right, product)
                    factors = branch.right.unsqueeze(0)
                    self._finish(to, product, factors, own, pair, branch.pair_offset, chunk, add)
            if products is not None:
                multiply(branch, grad_columns.mT, x[:, chunk], products, chunk.start > 0)
        if right is not None and products is not None:
            whole = slice(0, branch.columns)
            of_columns = (columns, rows, -branch.pair_offset)
            self._finish(right, products, branch.left, *of_columns, whole, None)

    def _finish(
        self,
        out: Tensor,  # [B, M, W]: only `rows` are written
        product: Tensor,  # [B, rows, W] float32
        factors: Tensor,  # [TERMS, B, N, W]
        own: Direction,  # of the rows of out
        pair: Direction,  # of the rows of factors
        pair_offset: int,
        rows: slice,
        add: Tensor | None,  # [B, M, W]
    ) -> None:
        problems, count, width = out.shape
        tiles = triton.cdiv(product.shape[1], _GRADIENT["BLOCK_ROWS"])
        tiles *= triton.cdiv(width, _GRADIENT["BLOCK_COLUMNS"])
        gradient_kernel[(problems * tiles,)](
            out,
            product,
            factors,
            add,
            own.nll,
            own.weight,
            pair.nll if self.grad_logits.settings.differentiate_keys else None,
            pair.weight if self.grad_logits.settings.differentiate_keys else None,
            self.multiplier,
            self.divisor,
            self.scale,
            count,
            factors.shape[2],
            pair_offset,
            self.grad_logits.total,
            width,
            factors.stride(0),
            rows.start,
            product.shape[1],
            TERMS=factors.shape[0],
            SMOOTHING=self.grad_logits.settings.label_smoothing,
            GAIN=self.grad_logits.gain,
            **_GRADIENT,
        )


def _scale_gradient(
    partials: Tensor,  # [B, row blocks, column tiles]
    multiplier: Tensor,  # [B]
    divisor: int,
    add_to: Tensor | None,  # []
) -> Tensor:
    # Returns the gradient of s [], accumulated into add_to.
    out = partials.new_empty(()) if add_to is None else add_to
    scale_gradient_kernel[(1,)](
        out,
        partials,
        multiplier,
        divisor,
        partials.shape[1] * partials.shape[2],
        partials.numel(),
        ACCUMULATE=add_to is not None,
        **_SCALE,
    )
    return out


def products_of(
    branch: Branch,
    dtype: torch.dtype,
    needs_left: bool,
    needs_right: bool,
    launch: Callable[[Chunk], None],
) -> tuple[Tensor | None, Tensor | None]:
    """Returns dS Y [B, M, W] and dS^T X [B, N, W] in float32, of the dS [dtype] that launch writes.

    None where not needed; launch is called in any case.
    """
    problems, width = branch.problems, branch.right.shape[-1]
    left = branch.new_empty(problems, branch.rows, width) if needs_left else None
    right = branch.new_empty(problems, branch.columns, width) if needs_right else None
    for chunk, (grad,) in in_chunks(branch, int(needs_left or needs_right), dtype, launch):
        if left is not None:
            product = branch.new_empty(problems, grad.shape[1], width)
            multiply(branch, grad, branch.right, product)
            left[:, chunk] = product
        if right is not None:
            multiply(branch, grad.mT, branch.left[0][:, chunk], right, chunk.start > 0)
    return left, right


def multiply(
    branch: Branch,
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, K, W]
    out: Tensor,  # [B, M, W] float32
    accumulate: bool = False,
) -> None:
    """Writes out = x y, or out += x y, accumulated in float32."""
    if branch.rank is not None:
        bounded_product(x, y, branch.rank, "columns", out, accumulate=accumulate)
    elif x.is_cuda and x.dtype != torch.float32:
        beta = int(accumulate)  # with 0, out is not read
        torch.baddbmm(out, x, y, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.baddbmm(out, x.float(), y.float(), beta=int(accumulate), out=out)


@triton.jit(do_not_specialize=COUNTS)
def gradient_kernel(
    out_ptr,  # [B, M, W]: `rows` rows from first_row on are written
    product_ptr,  # [B, rows, W] float32: GAIN * 2 N dS Y, with zeros for the pairs in dS
    factors_ptr,  # [TERMS, B, N, W]: Y as a sum of terms
    add_ptr,  # [B, M, W] float32, or None
    nll_ptr,  # [B, M] float32, of the rows of out
    weight_ptr,  # [B, M] float32, or None
    pair_nll_ptr,  # [B, N] float32, of the rows of Y; None if dS has only one direction
    pair_weight_ptr,  # [B, N] float32, or None
    multiplier_ptr,  # [B] float32: the gradient is scaled by multiplier / divisor
    divisor,
    scale_ptr,  # []; None means 1
    count,  # M
    pair_count,  # N
    pair_offset,  # row i of out and row i + pair_offset of Y are a pair
    total,  # samples of the batch
    width,
    term_stride,
    first_row,
    rows,
    TERMS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Writes s dS Y + add, eq. (7), given the product without the positives.

    The positives are added in float32: they are the largest entries of dS, and rounding them to 16
    bits would cause most of the error.
    """
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
    row_block = tl.program_id(0) % row_blocks
    column_block = (tl.program_id(0) // row_blocks) % column_blocks
    problem = (tl.program_id(0) // (row_blocks * column_blocks)).to(tl.int64)
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask, column_mask = row < rows, (column < width)[None, :]
    at_row = problem * count + first_row + row
    at = at_row[:, None] * width + column[None, :]
    mask = row_mask[:, None] & column_mask

    pair = first_row + row + pair_offset
    paired = row_mask & (pair >= 0) & (pair < pair_count)
    at_pair = problem * pair_count + pair
    positive = grad_positive(nll_ptr, weight_ptr, at_row, row_mask, total, SMOOTHING)
    if pair_nll_ptr is not None:
        positive += grad_positive(pair_nll_ptr, pair_weight_ptr, at_pair, paired, total, SMOOTHING)
    factors_ptr += at_pair[:, None] * width + column[None, :]
    factors = tl.load(factors_ptr, mask=paired[:, None] & column_mask, other=0.0).to(tl.float32)
    for term in tl.static_range(1, TERMS):
        term_ptr = factors_ptr + term * tl.cast(term_stride, tl.int64)
        factors += tl.load(term_ptr, mask=paired[:, None] & column_mask, other=0.0).to(tl.float32)

    at_product = (problem * rows + row)[:, None] * width + column[None, :]
    gradient = tl.load(product_ptr + at_product, mask=mask, other=0.0) * (1.0 / GAIN)
    gradient += positive[:, None] * factors
    weight = tl.load(multiplier_ptr + problem) / divisor
    if scale_ptr is not None:
        weight *= tl.load(scale_ptr).to(tl.float32)
    gradient *= weight
    if add_ptr is not None:
        gradient += tl.load(add_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, rounded(gradient, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def scale_gradient_kernel(
    grad_scale_ptr,  # [] float32
    partials_ptr,  # [B, parts] float32: partial sums of 2 N dS_ij (x_i . y_j)
    multiplier_ptr,  # [B] float32: the gradient is scaled by multiplier / divisor
    divisor,
    parts,
    count,  # B parts
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes or accumulates ds, eq. (7). One program, since there are only (N / 128)^2 parts."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        valid = entries < count
        weight = tl.load(multiplier_ptr + entries // parts, mask=valid, other=0.0) / divisor
        sums += weight * tl.load(partials_ptr + entries, mask=valid, other=0.0)
    gradient = tl.sum(sums)
    if ACCUMULATE:
        gradient += tl.load(grad_scale_ptr)
    tl.store(grad_scale_ptr, gradient)
