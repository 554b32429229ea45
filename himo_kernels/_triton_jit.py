"""Triton functions that all kernels share. Only modules with kernels import this one.

dot, raised and rounded work around Triton's interpreter (3.6 to 3.9), which stores bfloat16 as
integers: tl.dot multiplies their bits, rounding to bfloat16 drops the carry into the exponent
(1.999 gives 1), and converting a subnormal to float32 gives a wrong value.
"""

import triton
import triton.language as tl

from himo_kernels import _triton

INTERPRETED = tl.constexpr(_triton.INTERPRETED)

# Integers that only count or bound, for do_not_specialize: Triton would compile another kernel
# where one is 1, or a multiple of 16. Lengths that vectors are loaded along (width, pitch, strides)
# are not among them. Nor are the row_count and column_count of a tile of logits, whose masks take
# hundreds of instructions more if they may end anywhere. `make aot` found spills without the
# specialisation in normalize, which therefore does not use this.
COUNTS = (
    *("pair_offset", "samples", "total", "divisor", "splits", "count", "pair_count", "parts"),
    *("chunk_rows", "first_block", "row_blocks", "all_row_blocks", "first_row", "rows"),
    *("slots", "first_slot", "to_slot", "row_slots", "column_slots", "filled"),
)


@triton.jit
def dot(x, y, accumulator, PRECISION: tl.constexpr):
    """x y + accumulator, summed in float32. Products of 16-bit numbers are exact in float32."""
    if INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, accumulator, input_precision=PRECISION)


@triton.jit
def raised(x):
    """x converted to float32; float64 stays float64."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        result = bits.to(tl.float32, bitcast=True)
    elif x.dtype == tl.float64:
        result = x
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x rounded to another floating-point dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = tl.where(x == x, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def float64_of(bits):
    """The float64 with these bits, made by _triton.float64_bits."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)
