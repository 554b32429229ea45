"""lightly's NTXentLoss (SimCLR, and MoCo with a memory bank), by this library's operators.

Written for the interface since 1.1, `forward(out0, out1)`. Its logits are cosines over the
temperature. Without a bank, each of the 2 N rows of both views is classified among all rows but
itself: nt_xent. With gather_distributed these are the rows of all ranks. With a bank, each row of
out0 is classified among its own row of out1 and the rows of the bank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from himo_kernels.dispatch import check_backend
from himo_kernels.info_nce import info_nce, nt_xent
from himo_kernels.integrations.kinds import (
    Kind,
    as_under_autocast,
    base_named,
    check_settings,
    gathered,
    raise_setting,
)

NAME = "NTXentLoss"


def forward_of(loss: Any, *, backend: str = "auto") -> Callable[..., Tensor]:
    """Returns the new NTXentLoss.forward."""
    check_backend("accelerate", backend)
    check_settings(NAME, loss, ("temperature",))
    _bank_of(loss)

    def forward(
        self: Any,
        out0: Tensor,  # [N, D]
        out1: Tensor,  # [N, D]
    ) -> Tensor:
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        out1, negatives = _bank_of(self)(out1, update=out0.requires_grad)
        out0, out1 = as_under_autocast(out0, out1)
        scale = 1 / self.temperature
        if negatives is not None:
            return _against(negatives.T.to(out0), out0, out1, scale, backend)
        if getattr(self, "gather_distributed", False) and dist.is_initialized():
            return _over_ranks(out0, out1, scale, backend)
        return nt_xent(out0, out1, scale, backend=backend)

    return forward


KINDS = (
    Kind(
        "lightly's NTXentLoss",
        partial(base_named, name=NAME, package="lightly"),
        ("forward",),
        forward_of,
        ("backend",),
    ),
)


def _bank_of(loss: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Returns what asks the memory bank and updates it: a part of the loss since 1.6, else a base.

    It is called with rows [N, D] and `update`, and returns them and the bank [D, K] or None.
    """
    if hasattr(loss, "memory_bank"):
        return loss.memory_bank.forward
    known = base_named(loss, "MemoryBankModule", "lightly")
    if known is None:
        raise_setting("accelerate", NAME, "of lightly 1.1 or later", "one without a memory bank")
    return partial(known.forward, loss)  # type: ignore[attr-defined]


def _against(
    bank: Tensor,  # [K, D]
    out0: Tensor,  # [N, D]
    out1: Tensor,  # [N, D]
    scale: Tensor | float,
    backend: str,
) -> Tensor:
    # The other rows of out1 are no pairs: they have the rows' label, which no row of the bank has.
    rows, of_bank = (torch.zeros(len(x), dtype=torch.int64, device=x.device) for x in (out0, bank))
    return info_nce(
        out0,
        torch.cat([out1, bank]),
        scale,
        directions="rows",
        labels=(rows, torch.cat([rows, of_bank + 1])),
        same_label="exclude",
        backend=backend,
    )


def _over_ranks(out0: Tensor, out1: Tensor, scale: Tensor | float, backend: str) -> Tensor:
    all0, all1 = gathered(NAME, out0), gathered(NAME, out1)
    first = dist.get_rank() * len(out0)
    own = torch.arange(first, first + len(out0), device=out0.device)
    other = own + len(all0)
    return info_nce(
        torch.cat([out0, out1]),
        torch.cat([all0, all1]),
        scale,
        directions="rows",
        positives=torch.cat([other, own]),
        labels=(torch.cat([own, other]), torch.arange(2 * len(all0), device=out0.device)),
        same_label="exclude",  # no row is a pair with itself
        backend=backend,
    )
