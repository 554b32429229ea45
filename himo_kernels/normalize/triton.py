"""The `triton` backend of normalize, for any strides. Not yet run on hardware.

One kernel in each direction. The first 32 KiB of a row, usually the whole row, stay in registers
between the sums and the result; the rest is read once for each of them. The order of a row's sum is
fixed, so results are bitwise equal from run to run. Equation numbers refer to README.md.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels._triton_jit import raised, rounded
from himo_kernels.aot import Case

# A program holds at most WIDEST_BYTES of a row in the accumulation dtype, and at least LEAST_BYTES,
# from several rows if one is shorter. A thread holds 32 bytes, up to 16 warps. Chosen from compiler
# output (no spills); not yet measured on hardware.
WIDEST_BYTES = 32 * 1024
LEAST_BYTES = 2048
WARP_BYTES = 1024
MOST_WARPS = 16
Options = dict[str, Any]  # options of a kernel launch


def normalize_fwd(
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the rows divided by their length [*, N, D]."""
    features = features.resolve_neg()  # a kernel reads memory, which ignores a lazy negation
    out = features.new_empty(features.shape)
    x = _flat(features)
    if x.numel():
        grid, sizes, options = _launch(x)
        _normalize_fwd_kernel[grid](out, x, *sizes, *x.stride(), **options)
    return out


def normalize_bwd(
    grad: Tensor,  # [*, N, D]
    features: Tensor,  # [*, N, D]
) -> Tensor:
    """Returns the gradient of the features [*, N, D]."""
    features, grad = features.resolve_neg(), grad.resolve_neg()
    out = features.new_empty(features.shape)
    x, grads = _flat(features), _flat(grad)
    if x.numel():
        grid, sizes, options = _launch(x)
        strides = (*x.stride(), *grads.stride())
        _normalize_bwd_kernel[grid](out, grads, x, *sizes, *strides, **options)
    return out


def _flat(x: Tensor) -> Tensor:  # [P, N, D]; copies only if a view is impossible
    *batch, samples, features = x.shape
    return x.reshape(math.prod(batch), samples, features)


def _launch(x: Tensor) -> tuple[tuple[int], tuple[int, int, int], Options]:
    # Returns grid, sizes and options of a launch for x [P, N, D].
    problems, samples, features = x.shape
    size = accumulation_dtype(x.dtype).itemsize
    block = min(triton.next_power_of_2(features), WIDEST_BYTES // size)
    rows_each = max(1, LEAST_BYTES // size // block)
    options = {
        "ROWS": rows_each,
        "BLOCK": block,
        "num_warps": min(block * rows_each * size // WARP_BYTES, MOST_WARPS),
        "enable_fp_fusion": True,
    }
    rows = problems * samples
    return (triton.cdiv(rows, rows_each),), (rows, samples, features), options


@triton.jit
def _row_offsets(rows, samples, stride_p, stride_n, ROWS: tl.constexpr):
    # Returns the rows of this program, their mask and their offsets; int64, because a matrix may
    # hold more than 2^31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < rows, row // samples * stride_p + row % samples * stride_n


@triton.jit
def _entries(ptr, starts, row_valid, first, features, stride_d, BLOCK: tl.constexpr):
    # Loads [ROWS, BLOCK] from column first on, in the accumulation dtype; 0 past the end.
    at = (first + tl.arange(0, BLOCK)).to(tl.int64)
    valid = row_valid[:, None] & (at < features)[None, :]
    return raised(tl.load(ptr + starts[:, None] + at[None, :] * stride_d, mask=valid, other=0.0))


@triton.jit
def _store(out_ptr, row, row_valid, first, features, value, BLOCK: tl.constexpr):
    at = (first + tl.arange(0, BLOCK)).to(tl.int64)
    valid = row_valid[:, None] & (at < features)[None, :]
    value = rounded(value, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * features + at[None, :], value, mask=valid)


@triton.jit
def _power_that_scales(largest):
    # The power of two that scales a number >= 0 to about 1, clamped so that it and its inverse are
    # normal numbers. Multiplying by it is exact except for entries that underflow.
    if largest.dtype == tl.float64:
        exponent = largest.to(tl.int64, bitcast=True) >> 52
        exponent = tl.minimum(tl.maximum(exponent, 1), 2045)
        scale = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _inverse_length(squares):
    # 1 / |u|; 0 for a row of zeros, NaN for a row with NaN or inf.
    if squares.dtype == tl.float64:
        inverse = 1.0 / tl.sqrt(squares)
    else:
        inverse = tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(squares))
    inverse = tl.where(squares < float("inf"), inverse, float("nan"))
    return tl.where(squares == 0, 0.0, inverse)


@triton.jit
def _normalize_fwd_kernel(
    out_ptr,  # [P, N, D] contiguous
    x_ptr,  # [P, N, D]
    rows,
    samples,
    features,
    stride_p,
    stride_n,
    stride_d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, valid, starts = _row_offsets(rows, samples, stride_p, stride_n, ROWS)
    x = _entries(x_ptr, starts, valid, 0, features, stride_d, BLOCK)
    largest = tl.max(tl.abs(x), 1)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.abs(more), 1))
    scale = _power_that_scales(largest)[:, None]  # (1)
    x *= scale
    squares = tl.sum(x * x, 1)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK) * scale
        squares += tl.sum(more * more, 1)
    inverse = _inverse_length(squares)[:, None]
    _store(out_ptr, row, valid, 0, features, x * inverse, BLOCK)  # (2)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK) * scale
        _store(out_ptr, row, valid, first, features, more * inverse, BLOCK)


@triton.jit
def _gradient(grad, u, scale, inverse, share):
    # (3). Multiply by the factors one by one: scale / |u| may be out of range when dx is not.
    return tl.where(inverse == 0, 0.0, (grad - u * share) * inverse * scale)


@triton.jit
def _normalize_bwd_kernel(
    out_ptr,  # [P, N, D] contiguous
    grad_ptr,  # [P, N, D]
    x_ptr,  # [P, N, D]
    rows,
    samples,
    features,
    stride_p,
    stride_n,
    stride_d,
    grad_stride_p,
    grad_stride_n,
    grad_stride_d,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, valid, starts = _row_offsets(rows, samples, stride_p, stride_n, ROWS)
    _, _, grad_starts = _row_offsets(rows, samples, grad_stride_p, grad_stride_n, ROWS)
    x = _entries(x_ptr, starts, valid, 0, features, stride_d, BLOCK)
    grad = _entries(grad_ptr, grad_starts, valid, 0, features, grad_stride_d, BLOCK)
    largest = tl.max(tl.abs(x), 1)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK)
        largest = tl.maximum(largest, tl.max(tl.abs(more), 1))
    scale = _power_that_scales(largest)[:, None]
    x *= scale
    squares, along = tl.sum(x * x, 1), tl.sum(grad * x, 1)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK) * scale
        more_grad = _entries(grad_ptr, grad_starts, valid, first, features, grad_stride_d, BLOCK)
        squares += tl.sum(more * more, 1)
        along += tl.sum(more_grad * more, 1)
    inverse = _inverse_length(squares)
    share = (along * inverse * inverse)[:, None]
    inverse = inverse[:, None]
    result = _gradient(grad, x, scale, inverse, share)
    _store(out_ptr, row, valid, 0, features, result, BLOCK)
    for first in range(BLOCK, features, BLOCK):
        more = _entries(x_ptr, starts, valid, first, features, stride_d, BLOCK) * scale
        more_grad = _entries(grad_ptr, grad_starts, valid, first, features, grad_stride_d, BLOCK)
        result = _gradient(more_grad, more, scale, inverse, share)
        _store(out_ptr, row, valid, first, features, result, BLOCK)


def aot_cases() -> Iterator[Case]:
    """The launches that himo_kernels.aot compiles."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for features in (8, 768, 4096, 20000):
            label = f"normalize {str(dtype)[6:]}, D={features}"
            yield Case(label, partial(_launch_both, features, dtype))


def _launch_both(features: int, dtype: torch.dtype) -> None:
    x = torch.empty(1024, features, dtype=dtype, device="meta")
    normalize_bwd(normalize_fwd(x), x)
