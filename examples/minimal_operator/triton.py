"""relu in Triton: each program masks one block of values."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _mask_kernel(out_ptr, value_ptr, x_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, place < count)
    value = tl.load(value_ptr + place, place < count)
    tl.store(out_ptr + place, tl.where(x <= 0, 0.0, value), place < count)


def relu_fwd(x: Tensor) -> Tensor:  # [*, N, D] -> [*, N, D]
    return relu_bwd(x, x)


def relu_bwd(grad: Tensor, x: Tensor) -> Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    _mask_kernel[(triton.cdiv(x.numel(), 1024),)](out, grad, x, x.numel(), BLOCK=1024)
    return out
