"""all_gather with an exact gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels._checks import check_flag, check_tensor, raise_shape
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import refuse_double_backward
from himo_kernels.distributed.agreement import agree
from himo_kernels.distributed.wire import Rows, members_of


def all_gather(
    x: Tensor,  # [M, D]
    group: dist.ProcessGroup | None = None,
    *,
    differentiate: bool = True,
) -> Tensor:
    """The rows of all ranks in rank order, [N, D], where N is the sum of the row counts.

    The gradient of this rank's rows is summed over ranks: exactly the gradient of the sum of the
    ranks' losses. Row counts may differ between ranks and may be 0; widths must be equal.

    Args:
        x: [M, D], float16, bfloat16, float32 or float64.
        group: the ranks; None is all of them, or this process alone without a process group.
        differentiate: False returns constants, including this rank's own rows, like the gather
            of the released code.

    Raises:
        ValueError, TypeError: on every rank, if x is wrong or does not match on any rank.
    """

    def check() -> None:
        check_flag("all_gather", "differentiate", differentiate)
        check_tensor("all_gather", "x", x)
        if x.dim() != 2:
            raise_shape("all_gather", "x", "[M, D]", x)

    needs_grad = isinstance(x, Tensor) and differentiate and x.requires_grad
    rows = agree(
        "all_gather",
        members_of(group, "all_gather"),
        x,
        check,
        settings=differentiate,
        needs_grad=(needs_grad and torch.is_grad_enabled(),),
    )
    return AllGather.apply(x, rows) if differentiate else rows.all_gather(x.detach())


class AllGather(torch.autograd.Function):
    """Rows.all_gather. Its backward sums in float32 or float64 and rounds once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return rows.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_double_backward("all_gather")
        wide = grad.to(accumulation_dtype(grad.dtype))
        return ctx.rows.reduce_scatter(wide).to(grad.dtype), None
