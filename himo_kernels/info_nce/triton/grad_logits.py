"""Pass 2: recomputes the logits and writes dS, one chunk of rows at a time, to a bounded workspace.

No value is read on the host, so a CUDA graph can capture all launches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._triton_jit import COUNTS, rounded
from himo_kernels.info_nce.compose import Direction, Settings
from himo_kernels.info_nce.triton.logits import Branch, tile_products, up_to_rank

# Holds dS of as many rows as fit. At N = 32768 that is a few thousand rows, enough for matmuls to
# run at their full rate.
WORKSPACE_BYTES = 256 * 2**20
# From this many samples on, dS of 16-bit features is stored in 16 bits for the tensor cores. Below,
# its products take less time than their launches, and float32 rounds the gradients only once, to
# the dtype of the features.
ROUNDED_FROM = 128


GROUP = 8  # row blocks that share a column tile in consecutive programs, for L2


@dataclass(frozen=True)
class Chunk:
    """Row blocks of one launch, and the workspace for their gradients."""

    workspace: Tensor  # [parts, B, chunk rows, pitch]
    first_block: int
    blocks: int

    def programs(self, branch: Branch) -> int:
        """Returns how many tiles of logits the chunk has."""
        return branch.problems * self.blocks * branch.column_tiles

    def sizes(self) -> tuple[int, int, int, int]:
        """Returns pitch, chunk rows, first block and blocks."""
        return self.workspace.shape[3], self.workspace.shape[2], self.first_block, self.blocks


def in_chunks(
    branch: Branch, parts: int, dtype: torch.dtype, launch: Callable[[Chunk], None]
) -> Iterator[tuple[slice, Tensor]]:
    """Calls launch for chunks of as many rows as WORKSPACE_BYTES holds gradients of.

    Yields (rows, gradients [parts, B, rows, N]) after each; nothing with parts=0.
    """
    tile, row_blocks = branch.tile, branch.row_blocks
    pitch = 64 * triton.cdiv(branch.columns, 64)  # align rows to cache lines
    block_bytes = parts * branch.problems * tile.rows * pitch * dtype.itemsize
    fitting = WORKSPACE_BYTES // block_bytes if block_bytes else row_blocks
    at_once = max(1, min(row_blocks, fitting))
    workspace = branch.new_empty(parts, branch.problems, at_once * tile.rows, pitch, dtype=dtype)
    for first_block in range(0, row_blocks, at_once):
        blocks = min(at_once, row_blocks - first_block)
        launch(Chunk(workspace, first_block, blocks))
        if parts:
            first, last = first_block * tile.rows, (first_block + blocks) * tile.rows
            last = min(last, branch.rows)
            yield slice(first, last), workspace[:, :, : last - first, : branch.columns]


def dtype_of_gradients(branch: Branch, samples: int) -> torch.dtype:
    """Returns the dtype in which the gradients of the logits are stored."""
    return branch.right.dtype if samples >= ROUNDED_FROM else torch.float32


def gain_of(dtype: torch.dtype) -> float:
    """Returns the factor by which the stored gradients are multiplied."""
    # Probabilities of 1e-5 are subnormal in float16, but not in float32 and bfloat16.
    return 1024.0 if dtype == torch.float16 else 1.0


@dataclass(frozen=True)
class GradLogits:
    """2 N dS of one loss, or of a block of it."""

    branch: Branch
    rows: Direction
    columns: Direction
    settings: Settings
    total: int  # samples of the batch
    scale_partials: Tensor | None = None  # [B, row blocks, column tiles], whole batches only

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of_gradients(self.branch, self.total)

    @property
    def gain(self) -> float:
        return gain_of(self.dtype)

    def chunks(self, parts: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (rows, row part, column part): gain * 2 N dS [B, rows, N], with zeros at pairs.

        With parts=1 both parts are the same tensor, which holds their sum. With parts=0 nothing is
        yielded and only the gradient of s is computed.
        """
        branch = self.branch

        def launch(chunk: Chunk) -> None:
            workspace = chunk.workspace
            grad_logits_kernel[(chunk.programs(branch),)](
                *branch.operands(),
                *self.rows,
                *self.columns,
                workspace[0] if parts else None,
                workspace[1] if parts == 2 else None,
                self.scale_partials,
                *branch.sizes(),
                self.total,
                *chunk.sizes(),
                branch.row_blocks,
                SMOOTHING=self.settings.label_smoothing,
                GAIN=self.gain,
                GROUP=GROUP,
                **branch.constants(),
            )

        for rows, chunk in in_chunks(branch, parts, self.dtype, launch):
            yield rows, chunk[0], chunk[-1]


def positives_of(branch: Branch) -> Tensor:
    """Returns S_ii [B, N] of a whole batch."""
    samples, _, _, width, term_stride = branch.sizes()
    positives = branch.new_empty(branch.problems, samples)
    positives_kernel[(branch.problems * branch.row_blocks,)](
        *branch.operands(),
        positives,
        samples,
        width,
        term_stride,
        branch.row_blocks,
        **branch.constants(),
    )
    return positives


@triton.jit(do_not_specialize=COUNTS)
def grad_logits_kernel(
    left_ptr,  # [TERMS, B, M, W]
    right_ptr,  # [B, N, W]
    rank_ptr,  # [B] int64, or None
    scale_ptr,  # []
    row_positives_ptr,  # [B, M] float32
    row_nll_ptr,  # [B, M] float32
    row_weight_ptr,  # [B, M] float32; None means 1
    column_positives_ptr,  # [B, N] float32
    column_nll_ptr,  # [B, N] float32
    column_weight_ptr,  # [B, N] float32; None means 1
    grad_rows_ptr,  # [B, chunk, pitch] or None: GAIN * weight * (P - eps / total), 0 at pairs
    grad_columns_ptr,  # [B, chunk, pitch]: same for C; if None, grad_rows receives the sum
    scale_partials_ptr,  # [B, row blocks, column tiles] float32, whole batches only, or None
    row_count,  # M
    column_count,  # N
    pair_offset,
    width,
    term_stride,
    total,  # samples of the batch
    pitch,
    chunk_rows,
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    all_row_blocks,
    TERMS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 2: recomputes a tile of S, writes 2 N dS to the workspace, and its part of ds."""
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
        up_to_rank(rank_ptr, problem, width),
        term_stride,
        TERMS,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
        PRECISION,
    )
    logits = tl.load(scale_ptr).to(tl.float32) * products
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    row_mask, column_mask = rows < row_count, columns < column_count
    uniform = SMOOTHING / total
    at_rows, at = problem * row_count + rows, problem * column_count + columns
    grad_rows = _grad_negatives(
        logits, row_positives_ptr, row_nll_ptr, row_weight_ptr, at_rows, row_mask, uniform, 1
    )
    grad_columns = _grad_negatives(
        logits, column_positives_ptr, column_nll_ptr, column_weight_ptr, at, column_mask, uniform, 0
    )
    pairs = rows[:, None] + pair_offset == columns[None, :]
    inside = row_mask[:, None] & column_mask[None, :]
    grad_rows = tl.where(inside & ~pairs, grad_rows, 0.0)
    grad_columns = tl.where(inside & ~pairs, grad_columns, 0.0)

    if scale_partials_ptr is not None:
        part = tl.sum((grad_rows + grad_columns) * products)
        if first_row // BLOCK_COLUMNS == tile:  # holds the diagonal: offset 0, whole batch
            diagonal = grad_positive(row_nll_ptr, None, at_rows, row_mask, total, SMOOTHING)
            diagonal += grad_positive(column_nll_ptr, None, at_rows, row_mask, total, SMOOTHING)
            part += tl.sum(diagonal * tl.sum(tl.where(pairs, products, 0.0), 1))
        at = (problem * all_row_blocks + first_block + block) * tiles + tile
        tl.store(scale_partials_ptr + at, part)
    if grad_rows_ptr is not None:
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        if grad_columns_ptr is None:
            both = grad_rows + grad_columns
            store_tile(grad_rows_ptr + start, both, row_mask, columns, pitch, GAIN)
        else:
            store_tile(grad_rows_ptr + start, grad_rows, row_mask, columns, pitch, GAIN)
            store_tile(grad_columns_ptr + start, grad_columns, row_mask, columns, pitch, GAIN)


@triton.jit
def block_and_tile(program, row_blocks, tiles, GROUP: tl.constexpr):
    """Returns the row block and column tile of a program; GROUP row blocks share a column tile."""
    group = program // (GROUP * tiles)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    in_group = program % (GROUP * tiles)
    return group * GROUP + in_group % group_rows, in_group // group_rows


@triton.jit
def _grad_negatives(
    logits,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    positives_ptr,
    nll_ptr,
    weight_ptr,  # None means 1
    at,  # [BLOCK]
    mask,  # [BLOCK]
    uniform,  # eps / total
    AXIS: tl.constexpr,  # of the logits that `at` is broadcast along: 1 for rows, 0 for columns
):
    """Returns 2 N dS at the negatives of one direction: w (P - eps / total)."""
    positives = tl.expand_dims(tl.load(positives_ptr + at, mask=mask, other=0.0), AXIS)
    nll = tl.expand_dims(tl.load(nll_ptr + at, mask=mask, other=0.0), AXIS)
    gradient = tl.exp((logits - positives) - nll) - uniform
    if weight_ptr is not None:
        gradient *= tl.expand_dims(tl.load(weight_ptr + at, mask=mask, other=0.0), AXIS)
    return gradient


@triton.jit
def store_tile(
    tile_ptr,  # first element of the tile in a workspace [B, chunk, pitch]
    grads,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    row_mask,  # [BLOCK_ROWS]
    columns,  # [BLOCK_COLUMNS]
    pitch,
    GAIN: tl.constexpr,
):
    """Writes GAIN * grads up to the pitch, a multiple of 16: vectors are stored for every N."""
    at = tl.arange(0, grads.shape[0])[:, None] * pitch + tl.arange(0, grads.shape[1])[None, :]
    stored = row_mask[:, None] & (columns < pitch)[None, :]
    tl.store(tile_ptr + at, rounded(grads * GAIN, tile_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=COUNTS)
def positives_kernel(
    left_ptr,  # [TERMS, B, N, W]
    right_ptr,  # [B, N, W]
    rank_ptr,  # [B] int64, or None
    scale_ptr,  # []
    positives_ptr,  # [B, N] float32
    samples,
    width,
    term_stride,
    row_blocks,
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes S_ii of a whole batch from the diagonal tiles, not from N dot products.

    S_ii then has the same bits as S_ij of equal rows in pass 2, whose gradient is exactly zero.
    """
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    problem = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_column = first_row // BLOCK_COLUMNS * BLOCK_COLUMNS
    products = tile_products(
        left_ptr + problem * samples * width,
        right_ptr + problem * samples * width,
        first_row,
        first_column,
        samples,
        samples,
        width,
        up_to_rank(rank_ptr, problem, width),
        term_stride,
        TERMS,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_INNER,
        PRECISION,
    )
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    logits = tl.load(scale_ptr).to(tl.float32) * products
    positives = tl.sum(tl.where(rows[:, None] == columns[None, :], logits, 0.0), 1)
    tl.store(positives_ptr + problem * samples + rows, positives, mask=rows < samples)


@triton.jit
def grad_positive(
    nll_ptr,  # float32
    weight_ptr,  # float32; None means 1
    at,  # [BLOCK]
    mask,  # [BLOCK]
    total,  # samples of the batch
    SMOOTHING: tl.constexpr,
):
    """Returns 2 N dS at the positives of one direction: w (P_ii - (1 - eps) - eps / N), eq. (6)."""
    # P_ii - 1 = expm1(-nll) avoids cancellation for P_ii near 1.
    nll = tl.load(nll_ptr + at, mask=mask, other=0.0)
    gradient = expm1(-nll) + (SMOOTHING - SMOOTHING / total)
    if weight_ptr is not None:
        gradient *= tl.load(weight_ptr + at, mask=mask, other=0.0)
    return gradient


@triton.jit
def expm1(x):
    # exp(x) - 1 for x <= 0 to full precision; for x > -1 by its Taylor series up to x^11.
    series = 1 + x * (1.0 / 11)
    for index in tl.static_range(10, 1, -1):
        series = 1 + x * (1.0 / index) * series
    return tl.where(x > -1, x * series, tl.exp(x) - 1)
