"""GradCache's SimpleContrastiveLoss and DistributedContrastiveLoss, by `info_nce`.

They are not modules: GradCache calls its loss_fn, which looks `__call__` up on the class. The loss
of queries x [N, D] and keys y [M, D] is the cross-entropy of the logits x @ y.T, whose row i has
its positive at column target[i], by default column i (1 + n_hard_negatives). Over ranks both sides
are gathered, and every rank computes the loss of all rows; only its own rows get a gradient, the
gradient of this loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from himo_kernels._checks import raise_shape
from himo_kernels.dispatch import check_backend
from himo_kernels.info_nce import info_nce
from himo_kernels.integrations.kinds import Kind, as_under_autocast, base_named, check_settings

NAMES = ("DistributedContrastiveLoss", "SimpleContrastiveLoss")


def call_of(loss: Any, *, backend: str = "auto") -> Callable[..., Tensor]:
    """Returns the new __call__."""
    check_backend("accelerate", backend)
    check_settings(type(loss).__name__, loss, ("target_per_qry",))

    def __call__(
        self: Any,
        x: Tensor,  # [N, D]
        y: Tensor,  # [M, D]
        target: Tensor | None = None,  # [N]
        reduction: str = "mean",
    ) -> Tensor:
        if base_named(self, NAMES[0], "grad_cache") is not None:
            x, y = self.gather_tensor(x), self.gather_tensor(y)
        if target is None:
            if len(y) != len(x) * self.target_per_qry:
                expected = f"[{len(x) * self.target_per_qry}, D] for {len(x)} rows of x"
                raise_shape(NAMES[1], "y", expected, y)
            target = torch.arange(0, len(y), self.target_per_qry, device=x.device)
        x, y = as_under_autocast(x, y)
        return info_nce(
            x, y, 1.0, directions="rows", positives=target, reduction=reduction, backend=backend
        )

    return __call__


KINDS = tuple(
    Kind(
        f"GradCache's {name}",
        partial(base_named, name=name, package="grad_cache"),
        methods,
        call_of,
        ("backend",),
        "__call__",
    )
    for name, methods in zip(NAMES, (("__call__", "gather_tensor"), ("__call__",)), strict=True)
)
