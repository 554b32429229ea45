"""The kernels of info_nce_pairs: one direction, rectangles, positives, labels and exclusions.

The tiles of logits are those of the square form. What a pair is follows from the integers of its
row and of its column (pairs/plan.py), which the kernels compare in the tile: no mask is formed.
"""

import triton
import triton.language as tl

from himo_kernels.info_nce.triton.grad_logits import block_and_tile, expm1, store
from himo_kernels.info_nce.triton.logits import tile_products
from himo_kernels.info_nce.triton.losses import finite_shift


@triton.jit
def pairs_statistics_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    single_ptr,  # [B, N] int32
    values_ptr,  # [3, B, N] float32: reference, target, share
    log_ptr,  # [B, splits, N] float32: log sum exp (S - r), without the single positive
    total_ptr,  # [B, splits, N] float32: T
    row_count,  # N
    column_count,  # M
    width,
    problems,
    row_blocks,
    splits,  # programs that share a row block, each with some of the columns
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1 of the rows: the statistics of compose.Statistics over some of the columns."""
    # Neighbouring programs visit the same columns, so all but the first read them from L2.
    block = tl.program_id(0) % row_blocks
    split = (tl.program_id(0) // row_blocks) % splits
    problem = (tl.program_id(0) // (row_blocks * splits)).to(tl.int64)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    first_row = block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_mask, at_rows = rows < row_count, problem * row_count + rows
    scale = tl.load(scale_ptr).to(tl.float32)
    single = tl.load(single_ptr + at_rows, mask=row_mask, other=-1)[:, None]
    of_each = tl.cast(problems, tl.int64) * row_count
    reference = tl.load(values_ptr + at_rows, mask=row_mask, other=0.0)[:, None]
    target = tl.load(values_ptr + of_each + at_rows, mask=row_mask, other=0.0)[:, None]
    share = tl.load(values_ptr + 2 * of_each + at_rows, mask=row_mask, other=0.0)[:, None]
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    per_split = tl.cdiv(tiles, splits)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        first_column = tile * BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        products = tile_products(
            *(left_ptr, right_ptr, first_row, first_column, row_count, column_count, width, width),
            *(0, 1, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION),
        )
        positive, allowed = _pairs(
            *(row_sets_ptr, column_sets_ptr, rows, columns, problem, problems),
            *(row_count, column_count, EXCLUDE_SELF, HAS_LABELS),
        )
        relative = scale * products - reference
        counted = allowed & (columns[None, :] != single)
        weights = tl.where(positive, target, 0.0) + share
        total += tl.sum(tl.where(counted, weights * relative, 0.0), 1)
        relative = tl.where(counted, relative, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(relative, 1))
        shift = finite_shift(new_max)
        row_sum = row_sum * tl.exp(row_max - shift)
        row_sum += tl.sum(tl.exp(relative - shift[:, None]), 1)
        row_max = new_max
    at = (problem * splits + split) * row_count + rows
    tl.store(log_ptr + at, finite_shift(row_max) + tl.log(row_sum), mask=row_mask)
    tl.store(total_ptr + at, total, mask=row_mask)


@triton.jit
def pairs_gradient_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    row_single_ptr,  # [B, N] int32
    row_values_ptr,  # [5, B, N] float32: reference, target, share, log, weight
    column_single_ptr,  # [B, M] int32, or None: the columns have no losses
    column_values_ptr,  # [5, B, M] float32, or None
    grad_ptr,  # [B, chunk, pitch]: GAIN * dL/dS, or None
    scale_partials_ptr,  # [B, row blocks, column tiles] float32, or None
    row_count,  # N
    column_count,  # M
    width,
    problems,
    pitch,
    chunk_rows,
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    all_row_blocks,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 2: recomputes a tile of S, writes dL/dS to the workspace, and its part of ds."""
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    problem = (tl.program_id(0) // (row_blocks * tiles)).to(tl.int64)
    program = tl.program_id(0) % (row_blocks * tiles)
    block, tile = block_and_tile(program, row_blocks, tiles, GROUP)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    first_row = (first_block + block) * BLOCK_ROWS
    first_column = tile * BLOCK_COLUMNS
    products = tile_products(
        *(left_ptr, right_ptr, first_row, first_column, row_count, column_count, width, width),
        *(0, 1, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, PRECISION),
    )
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    positive, allowed = _pairs(
        *(row_sets_ptr, column_sets_ptr, rows, columns, problem, problems),
        *(row_count, column_count, EXCLUDE_SELF, HAS_LABELS),
    )
    logits = tl.load(scale_ptr).to(tl.float32) * products
    gradient = _grad_logits(
        *(logits, positive, row_single_ptr, row_values_ptr, problem, problems, rows),
        *(row_count, columns[None, :], SMOOTHING, 1),
    )
    if column_single_ptr is not None:
        gradient += _grad_logits(
            *(logits, positive, column_single_ptr, column_values_ptr, problem, problems, columns),
            *(column_count, rows[:, None], SMOOTHING, 0),
        )
    gradient = tl.where(allowed, gradient, 0.0)
    if scale_partials_ptr is not None:
        at = (problem * all_row_blocks + first_block + block) * tiles + tile
        tl.store(scale_partials_ptr + at, tl.sum(gradient * products))
    if grad_ptr is not None:
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        at = tl.arange(0, BLOCK_ROWS)[:, None] * pitch + tl.arange(0, BLOCK_COLUMNS)[None, :]
        inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
        store(grad_ptr + start + at, gradient * GAIN, inside)


@triton.jit
def _pairs(
    row_sets_ptr,  # [1 or 2, B, N] int32: keys, labels
    column_sets_ptr,  # [1 or 2, B, M] int32
    rows,  # [BLOCK_ROWS]
    columns,  # [BLOCK_COLUMNS]
    problem,
    problems,
    row_count,
    column_count,
    EXCLUDE_SELF: tl.constexpr,
    HAS_LABELS: tl.constexpr,
):
    """Returns which pairs are positive, and which are positive or negative."""
    row_mask, column_mask = rows < row_count, columns < column_count
    row_sets_ptr += problem * row_count + rows
    column_sets_ptr += problem * column_count + columns
    row_keys = tl.load(row_sets_ptr, mask=row_mask, other=-2)
    column_keys = tl.load(column_sets_ptr, mask=column_mask, other=-3)
    inside = row_mask[:, None] & column_mask[None, :]
    positive = inside & (row_keys[:, None] == column_keys[None, :])
    allowed = inside
    if HAS_LABELS:
        row_sets_ptr += tl.cast(problems, tl.int64) * row_count
        column_sets_ptr += tl.cast(problems, tl.int64) * column_count
        row_labels = tl.load(row_sets_ptr, mask=row_mask, other=-2)
        column_labels = tl.load(column_sets_ptr, mask=column_mask, other=-3)
        allowed &= positive | (row_labels[:, None] != column_labels[None, :])
    if EXCLUDE_SELF:
        other = rows[:, None] != columns[None, :]
        positive &= other
        allowed &= other
    return positive, allowed


@triton.jit
def _grad_logits(
    logits,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    positive,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    single_ptr,  # [B, n] int32, of one direction
    values_ptr,  # [5, B, n] float32: reference, target, share, log, weight
    problem,
    problems,
    own,  # [BLOCK], indices of this direction
    count,  # n
    others,  # indices of the other direction, [1, BLOCK_COLUMNS] or [BLOCK_ROWS, 1]
    SMOOTHING: tl.constexpr,
    AXIS: tl.constexpr,  # of the logits that `own` is broadcast along: 1 for rows, 0 for columns
):
    """Returns w (P - target [positive] - share) of one direction, before exclusions."""
    mask, of_each = own < count, tl.cast(problems, tl.int64) * count
    single = tl.load(single_ptr + problem * count + own, mask=mask, other=-1)
    values_ptr += problem * count + own
    reference = tl.expand_dims(tl.load(values_ptr, mask=mask, other=0.0), AXIS)
    target = tl.expand_dims(tl.load(values_ptr + of_each, mask=mask, other=0.0), AXIS)
    share = tl.expand_dims(tl.load(values_ptr + 2 * of_each, mask=mask, other=0.0), AXIS)
    log = tl.expand_dims(tl.load(values_ptr + 3 * of_each, mask=mask, other=0.0), AXIS)
    weight = tl.expand_dims(tl.load(values_ptr + 4 * of_each, mask=mask, other=0.0), AXIS)
    # P - 1 of a single positive is expm1(-log), without cancellation.
    of_single = expm1(-log) + SMOOTHING - share
    gradient = tl.exp((logits - reference) - log) - tl.where(positive, target, 0.0) - share
    return weight * tl.where(others == tl.expand_dims(single, AXIS), of_single, gradient)
