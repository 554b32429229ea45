"""The kernels over the M x N logits, which are formed a tile at a time and never stored.

S = s X Y^T. X [TERMS, B, M, W] is the sum of its terms: one for features, more for a product that
16 bits cannot hold. Both are contiguous and W is a multiple of 16 (branch.py pads), so that loads
are whole vectors. `rank` bounds the inner dimension on the device, and both are zero past it. Row i
and column i + pair_offset are a pair, where there is such a column: of a whole batch M = N and the
offset is 0. Offsets of problems and of blocks are int64, inside a block int32.
"""

import triton
import triton.language as tl

from himo_kernels._triton_jit import dot, rounded
from himo_kernels.info_nce.triton.epilogues import finite_shift, grad_positive


@triton.jit
def _products(
    left_ptr,  # [TERMS, M, W] of one problem
    right_ptr,  # [N, W] of one problem
    first_row,
    first_column,
    row_count,  # M
    column_count,  # N
    width,
    inner,  # columns of W that count
    term_stride,
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # X Y^T [BLOCK_ROWS, BLOCK_COLUMNS] in float32; zeros past M and N.
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    depth = tl.arange(0, BLOCK_INNER)
    left_ptr += first_row.to(tl.int64) * width
    right_ptr += first_column.to(tl.int64) * width
    left = left_ptr + rows[:, None] * width + depth[None, :]
    right = right_ptr + columns[None, :] * width + depth[:, None]
    row_mask = (first_row + rows < row_count)[:, None]
    column_mask = (first_column + columns < column_count)[None, :]
    accumulator = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        kept = start + depth < inner
        y = tl.load(right + start, mask=kept[:, None] & column_mask, other=0.0)
        for term in tl.static_range(TERMS):
            x_ptr = left + term * tl.cast(term_stride, tl.int64) + start
            x = tl.load(x_ptr, mask=kept[None, :] & row_mask, other=0.0)
            accumulator = dot(x, y, accumulator, PRECISION)
    return accumulator


@triton.jit
def up_to_rank(rank_ptr, problem, width):
    """rank rounded up to whole vectors of 16, or the width where there is none.

    What lies between is zero (branch.py), and masks of whole vectors keep loads whole.
    """
    if rank_ptr is None:
        inner = width
    else:
        inner = (tl.cdiv(tl.load(rank_ptr + problem), 16) * 16).to(tl.int32)
    return inner


@triton.jit
def statistics_kernel(
    left_ptr,  # [TERMS, B, M, W]
    right_ptr,  # [B, N, W]
    rank_ptr,  # [B] int64, or None
    scale_ptr,  # []
    positives_ptr,  # [B, M] float32: S_ii of a whole batch, or None
    row_partials_ptr,  # [B, splits, 2, M] float32: maximum and sum of exp over some negatives
    column_partials_ptr,  # [B, slots, 2, N] float32
    row_count,  # M
    column_count,  # N
    pair_offset,
    width,
    term_stride,
    slots,
    first_slot,  # of the column partials of this launch
    first_block,  # of this launch
    row_blocks,  # of this launch
    splits,  # programs that share a block of rows, each with some of its columns
    TERMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 1: row and column statistics of the negatives, and the positives, from one S."""
    # Neighbouring programs walk the same columns: those come from L2 for all but the first.
    program = tl.program_id(0)
    block = program % row_blocks
    split = (program // row_blocks) % splits
    problem = (program // (row_blocks * splits)).to(tl.int64)
    scale = tl.load(scale_ptr).to(tl.float32)
    inner = up_to_rank(rank_ptr, problem, width)
    left_ptr += problem * row_count * width
    right_ptr += problem * column_count * width
    row_partials_ptr += (problem * splits + split) * 2 * row_count
    column_partials_ptr += (problem * slots + first_slot + block) * 2 * column_count

    first_row = (first_block + block) * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    row_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    per_split = tl.cdiv(tiles, splits)
    for tile in range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        first_column = tile * BLOCK_COLUMNS
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        logits = scale * _products(
            left_ptr,
            right_ptr,
            first_row,
            first_column,
            row_count,
            column_count,
            width,
            inner,
            term_stride,
            TERMS,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_INNER,
            PRECISION,
        )
        pairs = rows[:, None] + pair_offset == columns[None, :]
        first_pair = first_row + pair_offset  # its column
        has_pairs = (first_pair < first_column + BLOCK_COLUMNS) & (
            first_pair + BLOCK_ROWS > first_column
        )
        if positives_ptr is not None:
            if has_pairs:  # all of the rows': BLOCK_ROWS divides BLOCK_COLUMNS
                positives = tl.sum(tl.where(pairs, logits, 0.0), 1)
                at = positives_ptr + problem * row_count + rows
                tl.store(at, positives, mask=rows < row_count)
        ragged = first_row + BLOCK_ROWS > row_count
        ragged |= first_column + BLOCK_COLUMNS > column_count
        if has_pairs | ragged:
            inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
            logits = tl.where(inside & ~pairs, logits, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(logits, 1))
        shift = finite_shift(new_max)
        row_sum = row_sum * tl.exp(row_max - shift)
        row_sum += tl.sum(tl.exp(logits - shift[:, None]), 1)
        row_max = new_max

        column_max = tl.max(logits, 0)
        column_sum = tl.sum(tl.exp(logits - finite_shift(column_max)[None, :]), 0)
        tl.store(column_partials_ptr + columns, column_max, mask=columns < column_count)
        at = column_partials_ptr + column_count + columns
        tl.store(at, column_sum, mask=columns < column_count)

    tl.store(row_partials_ptr + rows, row_max, mask=rows < row_count)
    tl.store(row_partials_ptr + row_count + rows, row_sum, mask=rows < row_count)


@triton.jit
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
    """S_ii of a whole batch by the tiles that hold them, not by N dot products.

    The same bits as S_ij of equal rows in pass 2, whose gradient is then zero to the last bit.
    """
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    problem = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_column = first_row // BLOCK_COLUMNS * BLOCK_COLUMNS
    products = _products(
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
def grad_logits_kernel(
    left_ptr,  # [TERMS, B, M, W]
    right_ptr,  # [B, N, W]
    rank_ptr,  # [B] int64, or None
    scale_ptr,  # []
    row_positives_ptr,  # [B, M] float32
    row_nll_ptr,  # [B, M] float32
    row_weight_ptr,  # [B, M] float32, or None: 1
    column_positives_ptr,  # [B, N] float32
    column_nll_ptr,  # [B, N] float32
    column_weight_ptr,  # [B, N] float32, or None: 1
    grad_rows_ptr,  # [B, chunk, pitch], or None: (P - eps / total) GAIN of rows, 0 at pairs, ...
    grad_columns_ptr,  # [B, chunk, pitch], or None: ... and of C; None: their sum in grad_rows
    scale_partials_ptr,  # [B, row blocks, column tiles] float32, of a whole batch, or None
    row_count,  # M
    column_count,  # N
    pair_offset,
    width,
    term_stride,
    total,  # samples of the batch
    pitch,
    chunk_rows,
    first_block,  # of this launch
    row_blocks,  # of this launch
    all_row_blocks,
    TERMS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that are walked column by column, for L2
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass 2: S again, a tile of 2 N dS into a workspace, and its part of ds."""
    tiles = tl.cdiv(column_count, BLOCK_COLUMNS)
    problem = (tl.program_id(0) // (row_blocks * tiles)).to(tl.int64)
    program = tl.program_id(0) % (row_blocks * tiles)
    group = program // (GROUP * tiles)
    group_rows = tl.minimum(row_blocks - group * GROUP, GROUP)
    block = group * GROUP + (program % (GROUP * tiles)) % group_rows
    tile = (program % (GROUP * tiles)) // group_rows

    first_row = (first_block + block) * BLOCK_ROWS
    first_column = tile * BLOCK_COLUMNS
    products = _products(
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
    at_rows, at_columns = problem * row_count + rows, problem * column_count + columns

    positives = tl.load(row_positives_ptr + at_rows, mask=row_mask, other=0.0)
    nll = tl.load(row_nll_ptr + at_rows, mask=row_mask, other=0.0)
    grad_rows = tl.exp((logits - positives[:, None]) - nll[:, None]) - SMOOTHING / total
    positives = tl.load(column_positives_ptr + at_columns, mask=column_mask, other=0.0)
    nll = tl.load(column_nll_ptr + at_columns, mask=column_mask, other=0.0)
    grad_columns = tl.exp((logits - positives[None, :]) - nll[None, :]) - SMOOTHING / total
    if row_weight_ptr is not None:
        grad_rows *= tl.load(row_weight_ptr + at_rows, mask=row_mask, other=0.0)[:, None]
    if column_weight_ptr is not None:
        weight = tl.load(column_weight_ptr + at_columns, mask=column_mask, other=0.0)
        grad_columns *= weight[None, :]
    pairs = rows[:, None] + pair_offset == columns[None, :]
    negatives = row_mask[:, None] & column_mask[None, :] & ~pairs
    grad_rows = tl.where(negatives, grad_rows, 0.0)
    grad_columns = tl.where(negatives, grad_columns, 0.0)

    if scale_partials_ptr is not None:
        part = tl.sum((grad_rows + grad_columns) * products)
        if first_row // BLOCK_COLUMNS == tile:  # a whole batch: BLOCK_ROWS divides BLOCK_COLUMNS
            diagonal = grad_positive(row_nll_ptr, None, at_rows, row_mask, total, SMOOTHING)
            diagonal += grad_positive(column_nll_ptr, None, at_rows, row_mask, total, SMOOTHING)
            part += tl.sum(diagonal * tl.sum(tl.where(pairs, products, 0.0), 1))
        at = (problem * all_row_blocks + first_block + block) * tiles + tile
        tl.store(scale_partials_ptr + at, part)
    if grad_rows_ptr is not None:
        inside = row_mask[:, None] & column_mask[None, :]
        start = (problem * chunk_rows + block * BLOCK_ROWS) * pitch + first_column
        at = tl.arange(0, BLOCK_ROWS)[:, None] * pitch + tl.arange(0, BLOCK_COLUMNS)[None, :]
        dtype = grad_rows_ptr.dtype.element_ty
        if grad_columns_ptr is None:
            grad = (grad_rows + grad_columns) * GAIN
            tl.store(grad_rows_ptr + start + at, rounded(grad, dtype), mask=inside)
        else:
            tl.store(grad_rows_ptr + start + at, rounded(grad_rows * GAIN, dtype), mask=inside)
            tl.store(
                grad_columns_ptr + start + at, rounded(grad_columns * GAIN, dtype), mask=inside
            )
