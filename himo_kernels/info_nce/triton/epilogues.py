"""What follows the logits: partial statistics to losses, products of dS to gradients.

O(N) and O(N W), each one pass. Sums have one order: the same bits in every run.
"""

import triton
import triton.language as tl

from himo_kernels._triton_jit import rounded


@triton.jit
def finite_shift(maximum):
    """What to subtract before exp: -inf, the maximum of nothing, less itself would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _merged(
    partials_ptr,  # [slots, 2, N] of one problem
    first_slot,
    count,
    entries,  # [BLOCK] int, which of N
    samples,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Maximum and sum [BLOCK] over the slots, in their order: the same bits in every run.
    total_max = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, SLOTS_AT_ONCE):
        slot = start + tl.arange(0, SLOTS_AT_ONCE)
        mask = (slot < count)[:, None] & (entries < samples)[None, :]
        at = partials_ptr + (first_slot + slot).to(tl.int64)[:, None] * 2 * samples
        at += entries[None, :]
        maximum = tl.load(at, mask=mask, other=float("-inf"))
        summed = tl.load(at + samples, mask=mask, other=0.0)
        new_max = tl.maximum(total_max, tl.max(maximum, 0))
        shift = finite_shift(new_max)
        total = total * tl.exp(total_max - shift)
        total += tl.sum(summed * tl.exp(maximum - shift[None, :]), 0)
        total_max = new_max
    return total_max, total


@triton.jit
def fold_kernel(
    partials_ptr,  # [B, slots, 2, N] float32
    samples,  # N
    slots,
    first_slot,
    count,
    to_slot,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the column partials of one launch into one slot, so that the next can use theirs."""
    blocks = tl.cdiv(samples, BLOCK)
    entries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    partials_ptr += problem * slots * 2 * samples
    maximum, total = _merged(
        partials_ptr, first_slot, count, entries, samples, SLOTS_AT_ONCE, BLOCK
    )
    to_ptr = partials_ptr + tl.cast(to_slot, tl.int64) * 2 * samples
    tl.store(to_ptr + entries, maximum, mask=entries < samples)
    tl.store(to_ptr + samples + entries, total, mask=entries < samples)


@triton.jit
def nll_kernel(
    row_partials_ptr,  # [B, row_slots, 2, N] float32
    column_partials_ptr,  # [B, column_slots, 2, N] float32
    positives_ptr,  # [B, N] float32
    row_nll_ptr,  # [B, N] float32
    column_nll_ptr,  # [B, N] float32
    loss_partials_ptr,  # [B, blocks] float32
    samples,
    row_slots,
    column_slots,
    column_count,  # of the column slots, from the first on
    SMOOTHING: tl.constexpr,
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """nll of both directions, and a block's part of the loss, but for the mean logit of eq. (5)."""
    blocks = tl.cdiv(samples, BLOCK)
    entries = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    valid = entries < samples
    at = problem * samples + entries
    positives = tl.load(positives_ptr + at, mask=valid, other=0.0)
    row_partials_ptr += problem * row_slots * 2 * samples
    column_partials_ptr += problem * column_slots * 2 * samples
    maximum, total = _merged(row_partials_ptr, 0, row_slots, entries, samples, SLOTS_AT_ONCE, BLOCK)
    row_nll = _nll(maximum, total, positives)
    maximum, total = _merged(
        column_partials_ptr, 0, column_count, entries, samples, SLOTS_AT_ONCE, BLOCK
    )
    column_nll = _nll(maximum, total, positives)
    tl.store(row_nll_ptr + at, row_nll, mask=valid)
    tl.store(column_nll_ptr + at, column_nll, mask=valid)
    terms = (row_nll + column_nll) / 2 + SMOOTHING * positives
    part = tl.sum(tl.where(valid, terms, 0.0)) / samples
    tl.store(loss_partials_ptr + tl.program_id(0), part)


@triton.jit
def log_odds_kernel(
    partials_ptr,  # [slots, 2, N] float32
    positives_ptr,  # [N] float32
    log_odds_ptr,  # [N] float32
    samples,  # N
    count,  # of the slots, from the first on
    SLOTS_AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log sum exp(S_ij - S_ii) of the negatives of one direction: what blocks of a batch add up."""
    entries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = entries < samples
    positives = tl.load(positives_ptr + entries, mask=valid, other=0.0)
    maximum, total = _merged(partials_ptr, 0, count, entries, samples, SLOTS_AT_ONCE, BLOCK)
    tl.store(log_odds_ptr + entries, _log_odds(maximum, total, positives), mask=valid)


@triton.jit
def _log_odds(maximum, total, positives):
    # The difference of two logits near 100 first: it is exact, and small where it matters.
    return (maximum - positives) + tl.log(total)


@triton.jit
def _nll(maximum, total, positives):
    # log(1 + sum_{j != i} exp(S_ij - S_ii)): eq. (4)
    log_odds = _log_odds(maximum, total, positives)
    return tl.where(log_odds < 0, 0.0, log_odds) + _log1p(tl.exp(-tl.abs(log_odds)))


@triton.jit
def _log1p(x):
    # log(1 + x) for 0 <= x <= 1, all digits: 2 artanh z, z = x / (2 + x) <= 1 / 3, to z^15.
    z = x / (2 + x)
    square = z * z
    series = 1.0 / 13 + square * (1.0 / 15)
    for odd in tl.static_range(11, 0, -2):
        series = 1.0 / odd + square * series
    return 2 * z * series


@triton.jit
def _expm1(x):
    # exp(x) - 1 for x <= 0, all digits: near 0 by its series, to x^11.
    series = 1 + x * (1.0 / 11)
    for index in tl.static_range(10, 1, -1):
        series = 1 + x * (1.0 / index) * series
    return tl.where(x > -1, x * series, tl.exp(x) - 1)


@triton.jit
def grad_positive(
    nll_ptr,  # float32
    weight_ptr,  # float32, or None: 1
    at,  # [BLOCK]
    mask,  # [BLOCK]
    total,  # samples of the batch
    SMOOTHING: tl.constexpr,
):
    """2 N dS of the positives of one direction, eq. (6): w (P_ii - (1 - eps) - eps / N)."""
    # P_ii - 1 = expm1(-nll): one less a probability near one would lose the digits.
    nll = tl.load(nll_ptr + at, mask=mask, other=0.0)
    gradient = _expm1(-nll) + (SMOOTHING - SMOOTHING / total)
    if weight_ptr is not None:
        gradient *= tl.load(weight_ptr + at, mask=mask, other=0.0)
    return gradient


@triton.jit
def gradient_kernel(
    out_ptr,  # [B, M, W]: `rows` rows of it are written
    product_ptr,  # [B, rows, W] float32: Y times GAIN times 2 N dS without the pairs
    factors_ptr,  # [TERMS, B, N, W]: Y, the sum of its terms
    add_ptr,  # [B, M, W] float32, or None
    nll_ptr,  # [B, M] float32, of the rows of out
    weight_ptr,  # [B, M] float32, or None
    pair_nll_ptr,  # [B, N] float32, of the rows of Y, or None: dS is of one softmax
    pair_weight_ptr,  # [B, N] float32, or None
    unit_ptr,  # [B] float32: what all is multiplied by, ...
    divisor,  # ... and divided by
    scale_ptr,  # [], or None: 1
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
    """s dS Y + add, eq. (7), from the product that leaves out the positives.

    They are added in float32: the largest entries of dS, and their rounding to 16 bits would be
    most of the error.
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
    weight = tl.load(unit_ptr + problem) / divisor
    if scale_ptr is not None:
        weight *= tl.load(scale_ptr).to(tl.float32)
    gradient *= weight
    if add_ptr is not None:
        gradient += tl.load(add_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + at, rounded(gradient, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_gradient_kernel(
    grad_scale_ptr,  # [] float32
    partials_ptr,  # [B, parts] float32: of the sum of 2 N dS_ij (x_i . y_j)
    unit_ptr,  # [B] float32: what all is multiplied by, ...
    divisor,  # ... and divided by
    parts,
    count,  # B parts
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ds, eq. (7), added to grad_scale or written to it. One program: there are (N / 128)^2."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        entries = start + tl.arange(0, BLOCK)
        valid = entries < count
        weight = tl.load(unit_ptr + entries // parts, mask=valid, other=0.0) / divisor
        sums += weight * tl.load(partials_ptr + entries, mask=valid, other=0.0)
    gradient = tl.sum(sums)
    if ACCUMULATE:
        gradient += tl.load(grad_scale_ptr)
    tl.store(grad_scale_ptr, gradient)
