"""open_clip's ClipLoss: the same loss and gradients, without N x N logits.

What its flags compute over W ranks. x is a rank's own rows, L the loss of the joined batch, and L_r
the mean over a rank's own rows in both directions.

    local_loss, gather_with_grad    value    gradient of x
    True,       True                L_r      W dL/dx: the share of himo_kernels.distributed
    True,       False               L_r      dL_r/dx, the keys constants
    False,      True                L        W dL/dx
    False,      False               L        dL/dx

In each case, after DDP averages gradients, logit_scale gets dL/ds. A logit_bias is added to all
logits, which does not change the softmax: its gradient is 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from himo_kernels import distributed
from himo_kernels._checks import raise_value
from himo_kernels.dispatch import check_backend
from himo_kernels.distributed.loss import check_strategy
from himo_kernels.distributed.wire import members_of
from himo_kernels.info_nce import info_nce
from himo_kernels.info_nce.api import bias_and_flag, with_logit_bias

OPTIONS = ("strategy", "backend")
METHODS = ("forward", "get_logits", "get_ground_truth")
SETTINGS = ("local_loss", "gather_with_grad", "world_size")  # of a ClipLoss, read at each call


def class_of(module: nn.Module) -> type | None:
    """Returns open_clip's ClipLoss if module is one or derives from it. Imports nothing."""
    for kind in type(module).__mro__:
        if kind.__name__ == "ClipLoss" and kind.__module__.split(".")[0] == "open_clip":
            return kind
    return None


def forward_of(loss: Any, *, strategy: str = "gather", backend: str = "auto") -> Callable[..., Any]:
    """Returns the new ClipLoss.forward."""
    check_strategy("accelerate", strategy)
    check_backend("accelerate", backend)
    if getattr(loss, "use_horovod", False):  # removed from open_clip after 3.3.0
        raise NotImplementedError("accelerate: expected torch.distributed, got use_horovod=True")
    missing = [name for name in SETTINGS if not hasattr(loss, name)]
    if missing:
        raise NotImplementedError(
            f"accelerate: expected ClipLoss with {SETTINGS}, got no {missing}"
        )

    def forward(
        self: Any,
        image_features: Tensor,  # [M, D], L2-normalised by the model
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor | float,  # []
        logit_bias: Tensor | float | None = None,  # []
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        logit_bias, output_dict = bias_and_flag("ClipLoss", logit_bias, output_dict)
        image_features, text_features = _as_under_autocast(image_features, text_features)
        if self.world_size == 1:
            value = info_nce(image_features, text_features, logit_scale, backend=backend)
        else:
            value = _over_ranks(self, image_features, text_features, logit_scale, strategy, backend)
        value = with_logit_bias(value, logit_bias)
        return {"contrastive_loss": value} if output_dict else value

    return forward


def _as_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Returns features in the dtype that autocast would use for a matmul.

    This library's operators follow their inputs' dtype. Autocast does not change float64.
    """
    device = features[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return features
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in features)


def _over_ranks(
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    strategy: str,
    backend: str,
) -> Tensor:
    members = members_of(None, "ClipLoss")
    ranks = members.size
    if loss.world_size != ranks:
        raise_value(
            "ClipLoss", "world_size", f"to be that of torch.distributed, {ranks}", loss.world_size
        )
    if not (loss.local_loss or loss.gather_with_grad):
        image_features = _WeightedGradient.apply(image_features, 1 / ranks)
        text_features = _WeightedGradient.apply(text_features, 1 / ranks)
    share = distributed.info_nce(
        image_features,
        text_features,
        logit_scale,
        strategy=strategy,
        differentiate_keys=loss.gather_with_grad or not loss.local_loss,
        backend=backend,
    )
    if loss.local_loss:
        return share
    mean = members.all_reduce(share.detach().clone()) / ranks
    return share + (mean - share.detach())


class _WeightedGradient(torch.autograd.Function):
    """x, with its gradient multiplied by a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.weight * grad, None
