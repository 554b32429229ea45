"""The `triton` backend of sigmoid_loss and of its blocks. Not yet run on hardware.

One kernel computes a tile of logits, adds up its losses, and writes dL/dl of a chunk of rows to a
bounded workspace, the operand of two matrix products. The order of all sums is fixed, so every run
gives the same bits. No value is read on the host, so a CUDA graph can capture all launches.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import COUNTS
from himo_kernels.aot import Case
from himo_kernels.info_nce.triton.grad_logits import (
    GROUP,
    Chunk,
    block_and_tile,
    dtype_of_gradients,
    gain_of,
    store_tile,
)
from himo_kernels.info_nce.triton.gradients import products_of
from himo_kernels.info_nce.triton.logits import Branch, features_branch, tile_products
from himo_kernels.info_nce.triton.losses import log1p

__all__ = ["aot_cases", "sigmoid_loss_block_fwd", "sigmoid_loss_fwd"]


def sigmoid_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the loss [*] and its gradients; empty where not needed."""
    branch = _branch(image_features, text_features, logit_scale)
    batch = image_features.shape[:-2]
    loss, *grads = _sums(branch, logit_bias, branch.columns, needs_grad)
    shapes = (image_features.shape, text_features.shape, batch, batch)
    return _unpadded(loss, batch), *(
        _unpadded(grad, shape) if needed else grad
        for grad, shape, needed in zip(grads, shapes, needs_grad, strict=True)
    )


def sigmoid_loss_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the sum of the losses [] and its gradients; empty where not needed."""
    branch = _branch(image_features, keys, logit_scale, offset)
    loss, *grads = _sums(branch, logit_bias, 1, needs_grad)
    shapes: tuple[torch.Size, ...] = (image_features.shape, keys.shape, loss.shape[1:])
    return _unpadded(loss, shapes[-1]), *(
        _unpadded(grad, shape) if needed else grad
        for grad, shape, needed in zip(grads, (*shapes, shapes[-1]), needs_grad, strict=True)
    )


def _branch(x: Tensor, y: Tensor, scale: Tensor, offset: int = 0) -> Branch:
    # A large tile holds the logits, their losses and dL/dl at once, and spills registers.
    return dataclasses.replace(features_branch(x, y, scale, offset), small_tiles=True)


def _unpadded(grad: Tensor, shape: torch.Size) -> Tensor:
    # [B, N, W] of features, or [B] of a scalar, in this shape.
    if grad.dim() == 1:  # cloned: outputs share no memory, and a caller may change a loss in place
        return grad.reshape(shape).clone()
    return grad[..., : shape[-1]].reshape(shape)


def _sums(
    branch: Branch, bias: Tensor, divisor: int, needs_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    # Returns the losses [B] and the gradients of X [B, M, W], Y [B, N, W], scale [B] and bias [B],
    # all divided by divisor; empty where not needed.
    needs_left, needs_right, needs_scale, needs_bias = needs_grad
    problems, rows, columns = branch.problems, branch.rows, branch.columns
    # Sums of a tile: of the loss, and of the gradients of scale and bias.
    partials = branch.new_empty(problems, 3, branch.row_blocks, branch.column_tiles)
    dtype = dtype_of_gradients(branch, max(rows, columns))
    gain, needs_features = gain_of(dtype), needs_left or needs_right

    def launch(chunk: Chunk) -> None:
        sigmoid_kernel[(chunk.programs(branch),)](
            branch.left,
            branch.right,
            branch.scale,
            bias,
            chunk.workspace if needs_features else None,
            partials,
            *branch.sizes(),
            *chunk.sizes(),
            branch.row_blocks,
            GAIN=gain,
            GROUP=GROUP,
            **branch.constants(),
        )

    left, right = products_of(branch, dtype, needs_left, needs_right, launch)
    factor = branch.scale.float() / (divisor * gain)
    sums = partials.sum((-2, -1), dtype=torch.float64).div_(divisor).float()  # [B, 3]
    loss, of_scale, of_bias = sums.unbind(1)
    return (
        loss,
        branch.new_empty(0) if left is None else left.mul_(factor),
        branch.new_empty(0) if right is None else right.mul_(factor),
        of_scale if needs_scale else branch.new_empty(0),
        of_bias if needs_bias else branch.new_empty(0),
    )


@triton.jit(do_not_specialize=COUNTS)
def sigmoid_kernel(
    left_ptr,  # [TERMS, B, M, W]
    right_ptr,  # [B, N, W]
    scale_ptr,  # []
    bias_ptr,  # []
    grad_ptr,  # [B, chunk, pitch]: GAIN * dL/dl, or None
    partials_ptr,  # [B, 3, row blocks, column tiles] float32
    row_count,  # M
    column_count,  # N
    pair_offset,
    width,
    term_stride,
    pitch,
    chunk_rows,
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    all_row_blocks,
    TERMS: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes a tile of logits, writes the sums over it, and dL/dl to the workspace."""
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    problem = (tl.program_id(0) // (row_blocks * tiles)).to(tl.int64)
    program = tl.program_id(0) % (row_blocks * tiles)
    block, tile = block_and_tile(program, row_blocks, tiles, GROUP)
    first_row = (first_block + block) * BLOCK_ROWS
    first_column = tile * BLOCK_COLUMNS
    products = tile_products(
        left_ptr + problem * row_count * width,
        right_ptr + problem * column_count * width,
        first_row,
        first_column,
        row_count,
        column_count,
        width,
        width,
        term_stride,
        TERMS,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
        PRECISION,
    )
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    pairs = rows[:, None] + pair_offset == columns[None, :]
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    # x = -z l. Both log(1 + exp(x)) and its derivative follow from exp(-|x|), which cannot
    # overflow.
    x = tl.load(scale_ptr).to(tl.float32) * products + tl.load(bias_ptr).to(tl.float32)
    x = tl.where(pairs, -x, x)
    e = tl.exp(-tl.abs(x))
    loss = tl.where(x > 0, x, 0.0) + log1p(e)
    gradient = tl.where(x > 0, 1.0, e) / (1.0 + e)
    gradient = tl.where(pairs, -gradient, gradient)
    loss, gradient = tl.where(inside, loss, 0.0), tl.where(inside, gradient, 0.0)

    part = all_row_blocks * tiles
    at = partials_ptr + problem * 3 * part + (first_block + block).to(tl.int64) * tiles + tile
    tl.store(at, tl.sum(loss))
    tl.store(at + part, tl.sum(gradient * products))
    tl.store(at + 2 * part, tl.sum(gradient))
    if grad_ptr is not None:
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        store_tile(grad_ptr + start, gradient, rows < row_count, columns, pitch, GAIN)


def aot_cases() -> Iterator[Case]:
    """Yields the launches that himo_kernels.aot compiles: both tiles, all dtypes, and blocks."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for samples in (8192, 128):
            label = f"sigmoid_loss {str(dtype)[6:]}, N={samples}"
            yield Case(label, partial(_whole, samples, dtype))
        # Blocks of two ranks. The smaller one has a row count and an offset not divisible by 16.
        for rows, keys, offset in ((4096, 8192, 4096), (120, 257, 137)):
            label = f"sigmoid_loss_block {str(dtype)[6:]}, {rows}x{keys}"
            run = partial(_block, rows, keys, offset, dtype)
            yield Case(label, run, ragged=rows % 16 > 0)


def _whole(samples: int, dtype: torch.dtype) -> None:
    features, scalar = _meta(samples, 768, dtype=dtype), _meta()
    for needed in (True, False):
        sigmoid_loss_fwd(features, features, scalar, scalar, [needed] * 4)


def _block(rows: int, keys: int, offset: int, dtype: torch.dtype) -> None:
    features = _meta(rows, 768, dtype=dtype), _meta(keys, 768, dtype=dtype)
    for needed in (True, False):
        sigmoid_loss_block_fwd(*features, _meta(), _meta(), offset, [needed] * 4)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
