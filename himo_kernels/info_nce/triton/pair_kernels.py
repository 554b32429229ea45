"""The kernels of info_nce_pairs: one direction, rectangles, positives, labels and exclusions.

The tiles of logits are computed as in the square form. The integers of a row and of a column
(pairs/plan.py) decide whether their pair is positive, negative or excluded. The kernels compare
them in the tile, so no mask is formed. One record of 32 bytes describes a row or column; it is
loaded 16 bytes at a time. RECORD names its fields; key and label are int32, the others float32.
"""

import triton
import triton.language as tl

from himo_kernels._triton_jit import COUNTS, rounded
from himo_kernels.info_nce.triton.grad_logits import block_and_tile, expm1
from himo_kernels.info_nce.triton.logits import tile_products
from himo_kernels.info_nce.triton.losses import finite_shift

# A target below 0 says that there is a single positive.
RECORD = ("key", "label", "reference", "target", "share", "log", "weight", "unused")


@triton.jit(do_not_specialize=COUNTS)
def pairs_statistics_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_records_ptr,  # [B, N, 8]
    column_keys_ptr,  # [B, M] int32: whole records in the loop would spill registers
    column_labels_ptr,  # [B, M] int32, or None
    log_ptr,  # [B, splits, N] float32: log sum exp (S - r), without the single positive
    total_ptr,  # [B, splits, N] float32: T
    row_count,  # N
    column_count,  # M
    width,
    row_blocks,
    splits,  # programs that share a row block, each with some of the columns
    EXCLUDE_SELF: tl.constexpr,
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
    column_keys_ptr += problem * column_count
    if column_labels_ptr is not None:
        column_labels_ptr += problem * column_count
    first_row = block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    scale = tl.load(scale_ptr).to(tl.float32)
    row_key, row_label, reference, target, share, _, _ = _records(
        row_records_ptr + problem * row_count * 8, rows, row_count, 1
    )
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
        key = tl.load(column_keys_ptr + columns, mask=columns < column_count, other=0)
        inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
        other = inside & (rows[:, None] != columns[None, :])
        allowed = other if EXCLUDE_SELF else inside
        positive = allowed & (row_key == key[None, :])
        if column_labels_ptr is not None:
            label = tl.load(column_labels_ptr + columns, mask=columns < column_count, other=0)
            allowed &= positive | (row_label != label[None, :])
        relative = scale * products - reference
        counted = allowed & ~(positive & (target < 0))
        weights = tl.where(positive, target, 0.0) + share
        total += tl.sum(tl.where(counted, weights * relative, 0.0), 1)
        relative = tl.where(counted, relative, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(relative, 1))
        shift = finite_shift(new_max)
        row_sum = row_sum * tl.exp(row_max - shift)
        row_sum += tl.sum(tl.exp(relative - shift[:, None]), 1)
        row_max = new_max
    at = (problem * splits + split) * row_count + rows
    tl.store(log_ptr + at, finite_shift(row_max) + tl.log(row_sum), mask=rows < row_count)
    tl.store(total_ptr + at, total, mask=rows < row_count)


@triton.jit(do_not_specialize=COUNTS)
def pairs_gradient_kernel(
    left_ptr,  # [B, N, W]
    right_ptr,  # [B, M, W]
    scale_ptr,  # []
    row_records_ptr,  # [B, N, 8]
    column_records_ptr,  # [B, M, 8]
    grad_ptr,  # [B, chunk, pitch]: GAIN * dL/dS, or None
    scale_partials_ptr,  # [B, row blocks, column tiles] float32, or None
    row_count,  # N
    column_count,  # M
    width,
    pitch,
    chunk_rows,
    first_block,  # first row block of this launch
    row_blocks,  # row blocks of this launch
    all_row_blocks,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BOTH: tl.constexpr,  # whether the columns have losses
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
    row_key, row_label, reference, target, share, log, weight = _records(
        row_records_ptr + problem * row_count * 8, rows, row_count, 1
    )
    key, label, reference_c, target_c, share_c, log_c, weight_c = _records(
        column_records_ptr + problem * column_count * 8, columns, column_count, 0
    )
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    other = inside & (rows[:, None] != columns[None, :])
    allowed = other if EXCLUDE_SELF else inside
    positive = allowed & (row_key == key)
    if HAS_LABELS:
        allowed &= positive | (row_label != label)
    logits = tl.load(scale_ptr).to(tl.float32) * products
    gradient = _grad_logits(logits, positive, reference, target, share, log, weight, SMOOTHING)
    if BOTH:
        gradient += _grad_logits(
            logits, positive, reference_c, target_c, share_c, log_c, weight_c, SMOOTHING
        )
    gradient = tl.where(allowed, gradient, 0.0)
    if scale_partials_ptr is not None:
        at = (problem * all_row_blocks + first_block + block) * tiles + tile
        tl.store(scale_partials_ptr + at, tl.sum(gradient * products))
    if grad_ptr is not None:
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        # As store_tile of grad_logits.py, whose call spills registers here for float32 on sm_90.
        at = tl.arange(0, BLOCK_ROWS)[:, None] * pitch + tl.arange(0, BLOCK_COLUMNS)[None, :]
        stored = (rows < row_count)[:, None] & (columns < pitch)[None, :]
        entries = rounded(gradient * GAIN, grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + start + at, entries, mask=stored)


@triton.jit
def _records(
    records_ptr,  # [n, 8] of one problem
    own,  # [BLOCK]
    count,  # n
    AXIS: tl.constexpr,  # that the fields are expanded along: 1 for rows, 0 for columns
):
    """Returns the fields of RECORD but the unused one, [BLOCK, 1] or [1, BLOCK] each."""
    at = own[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :]
    records = tl.load(records_ptr + at, mask=(own < count)[:, None], other=0.0)
    # Field 4a + 2b + c of [BLOCK, a, b, c]; a split takes the last dimension apart.
    even, odd = tl.split(tl.reshape(records, (own.shape[0], 2, 2, 2)))
    even_0, even_2 = tl.split(even)
    odd_1, odd_3 = tl.split(odd)
    key, share = tl.split(even_0)
    reference, weight = tl.split(even_2)
    label, log = tl.split(odd_1)
    target, _ = tl.split(odd_3)
    return (
        tl.expand_dims(key.to(tl.int32, bitcast=True), AXIS),
        tl.expand_dims(label.to(tl.int32, bitcast=True), AXIS),
        tl.expand_dims(reference, AXIS),
        tl.expand_dims(target, AXIS),
        tl.expand_dims(share, AXIS),
        tl.expand_dims(log, AXIS),
        tl.expand_dims(weight, AXIS),
    )


@triton.jit
def _grad_logits(logits, positive, reference, target, share, log, weight, SMOOTHING: tl.constexpr):
    """Returns w (P - target [positive] - share) of one direction, before exclusions."""
    # P - 1 of a single positive is expm1(-log), without cancellation.
    of_single = expm1(-log) + SMOOTHING - share
    gradient = tl.exp((logits - reference) - log) - tl.where(positive, target, 0.0) - share
    return weight * tl.where(positive & (target < 0), of_single, gradient)
