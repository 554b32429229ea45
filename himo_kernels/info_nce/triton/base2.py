"""Exponentials in base 2, one for both directions of a tile of logits.

The hardware's exponential is exp2, so log2 e is part of the scale: exp(S) = exp2(t d), d = x . y a
product and t = s log2 e. An exponent is always one multiply-add, t d - shift. On a GPU this rounds
once, so S is not rounded at all; everywhere else t d has the same bits wherever d has the same.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
REST_OF_LOG2E = tl.constexpr(1.9259629911e-08)  # log2 e minus its float32
LN2 = tl.constexpr(0.6931471805599453)
REST_OF_LN2 = tl.constexpr(-1.9046542121e-09)

# exp2 is 0 below 2^-126, and sums of columns are relative to the largest shift of the rows. What is
# lost from a sum of at least SMALLEST is below its rounding.
SMALLEST = tl.constexpr(2.0**-90)
# The same for a softmax: of a column whose log sum is at most this many bits below the largest of
# the rows, only probabilities below 2^-66 are lost.
RANGE = tl.constexpr(60.0)
# Multiplies -inf at masked entries, so it must not be 0. Any t d so small gives exp2(t d) = 1.
LEAST = tl.constexpr(1e-30)


@triton.jit
def base2(scale_ptr):  # [], or None, which means 1
    """Returns t = s log2 e."""
    if scale_ptr is None:
        t = tl.cast(LOG2E, tl.float32)
    else:
        t = tl.load(scale_ptr).to(tl.float32) * LOG2E
    return t


@triton.jit
def power(products, t, shift):
    """Returns exp2(t d - shift)."""
    return tl.exp2(tl.fma(products, t, -shift))


@triton.jit
def power_of_difference(a, b):
    """Returns exp2(a - b), of the difference before it is rounded.

    At 60 bits the rounding would be 1e-6 of the result.
    """
    difference, lost = difference_of(a, b)
    return tl.exp2(difference) * tl.fma(lost, LN2, 1.0)


@triton.jit
def difference_of(a, b):
    """Returns a - b and what its rounding takes, NaN of an infinite difference: Knuth's two-sum."""
    difference = a - b
    of_b = difference - a
    return difference, (a - (difference - of_b)) - (b + of_b)


@triton.jit
def finite_shift(maximum):
    """Returns the maximum to subtract before exp, with 0 for -inf: -inf - -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def weight_of(shift, to):
    """Returns what a sum relative to `shift` is multiplied by to be relative to `to`: 0 for -inf.

    `to` is finite, and the sum is 0 if the shift is -inf.
    """
    weight = power_of_difference(finite_shift(shift), to)
    return tl.where(shift == float("-inf"), 0.0, weight)


@triton.jit
def sums(
    products,  # [BLOCK_ROWS, BLOCK_COLUMNS], -inf where masked
    t,  # > 0
    row_max,  # [BLOCK_ROWS]: at least the largest t d of a row, -inf of a row without any entry
):
    """Returns the sums of exp2(t d - row_max) of rows, and of exp2(t d - top) of columns, and top.

    exp2(t d - top) = exp2(t d - a_i) exp2(a_i - top): the powers of the rows serve the columns. The
    sum of a column so far below the largest row that its powers may have become 0 is < SMALLEST.
    """
    # The weights come first, so that no power is held in a register while warps exchange `top`.
    top = tl.max(row_max, 0)
    weights = weight_of(row_max, finite_shift(top))
    powers = power(products, t, finite_shift(row_max)[:, None])
    return tl.sum(powers, 1), tl.sum(powers * weights[:, None], 0), top


@triton.jit
def softmaxes(
    products,  # [BLOCK_ROWS, BLOCK_COLUMNS]
    t,
    unit,  # of the positives: unit * positive is in bits
    row_positives_ptr,  # float32, and the next five
    row_nll_ptr,
    row_weight_ptr,  # None means 1
    column_positives_ptr,
    column_nll_ptr,
    column_weight_ptr,  # None means 1
    row_start,  # the tile's first row and column in these
    column_start,
    row_mask,  # [BLOCK_ROWS]
    column_mask,  # [BLOCK_COLUMNS]
    ADDED: tl.constexpr,
):
    """Returns the softmaxes of rows and columns, times their weights; if ADDED, their sum, twice.

    exp2(t d - b_j) = exp2(t d - a_i) exp2(a_i - top) exp2(top - b_j): a tile takes one exponential,
    or two if a column is so far below the largest row that the first factor may be 0.
    """
    row_log, row_factor = log_sum(
        load(row_positives_ptr, row_start, row_mask),
        load(row_nll_ptr, row_start, row_mask),
        load(row_weight_ptr, row_start, row_mask),
        unit,
    )
    top = tl.max(tl.where(row_mask, row_log, float("-inf")), 0)
    column_log, column_factor = log_sum(
        load(column_positives_ptr, column_start, column_mask),
        load(column_nll_ptr, column_start, column_mask),
        load(column_weight_ptr, column_start, column_mask),
        unit,
    )
    if tl.max(tl.where(column_mask, top - column_log, float("-inf")), 0) < RANGE:
        weights = power_of_difference(row_log, top)
        columns = power_of_difference(top, column_log) * column_factor
        of_columns = weights[:, None] * columns[None, :]
        powers = power(products, t, row_log[:, None])
        of_rows = powers * row_factor[:, None]
        of_columns = powers * ((row_factor[:, None] + of_columns) if ADDED else of_columns)
    else:
        of_columns = power(products, t, column_log[None, :]) * column_factor[None, :]
        of_rows = power(products, t, row_log[:, None]) * row_factor[:, None]
        if ADDED:
            of_columns += of_rows
    return of_columns if ADDED else of_rows, of_columns


@triton.jit
def log_sum(positives, nll, weight, unit):
    """Returns log2 of the sum of exp of a softmax, and a factor: w P = exp2(t d - log) factor."""
    bits = nll * LOG2E
    # Near 144 bits, rounding the sum would leave an error of 5e-6 in a whole row, and rounding the
    # bits of a nll of 40 one of 1e-6. The factor has what the roundings took.
    lost = tl.fma(nll, LOG2E, -bits) + nll * REST_OF_LOG2E
    log = tl.fma(positives, unit, bits)
    rounded = tl.fma(positives, unit, -log) + bits
    return log, weight * tl.exp2(-(rounded + lost))


@triton.jit
def load(ptr, start, mask):
    """Returns as many float32 from ptr + start on as the mask has; ones without a pointer."""
    if ptr is None:
        values = tl.full(mask.shape, 1.0, tl.float32)
    else:  # the scalar first, so that all loads share an address
        values = tl.load(ptr + start + tl.arange(0, mask.shape[0]), mask=mask, other=0.0)
    return values
