"""scale_rows in Triton: one program scales one row."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scale_rows_kernel(out_ptr, x_ptr, scale_ptr, columns, stride_n, stride_d, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + row * stride_n + column * stride_d, mask=column < columns)
    tl.store(out_ptr + row * columns + column, x * tl.load(scale_ptr + row), mask=column < columns)


def scale_rows_fwd(x: Tensor, scale: Tensor) -> Tensor:  # [N, D], [N] -> [N, D]
    out, scale = torch.empty_like(x, memory_format=torch.contiguous_format), scale.contiguous()
    block = triton.next_power_of_2(x.shape[1])
    _scale_rows_kernel[(len(x),)](out, x, scale, x.shape[1], *x.stride(), BLOCK=block)
    return out


def scale_rows_bwd(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale_rows_fwd(grad, scale), (grad * x).sum(-1)
