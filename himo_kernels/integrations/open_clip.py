"""open_clip's ClipLoss, CoCaLoss and SigLipLoss, by this library's operators.

What the flags of ClipLoss, and of CoCaLoss's contrastive half, compute over W ranks. x is a rank's
own rows, L the loss of the joined batch, and L_r the mean over a rank's own rows in both
directions.

    local_loss, gather_with_grad    value    gradient of x
    True,       True                L_r      W dL/dx: the share of himo_kernels.distributed
    True,       False               L_r      dL_r/dx, the keys constants
    False,      True                L        W dL/dx
    False,      False               L        dL/dx

In each case, after DDP averages gradients, logit_scale gets dL/ds. A logit_bias is added to all
logits, which does not change the softmax: its gradient is 0.

SigLipLoss is L_r of the rows of images, with W dL/dx: the share of himo_kernels.distributed,
whichever dist_impl exchanges the texts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from himo_kernels import distributed
from himo_kernels._checks import raise_value
from himo_kernels.dispatch import check_backend
from himo_kernels.distributed.loss import check_strategy
from himo_kernels.distributed.wire import Members, members_of
from himo_kernels.info_nce import info_nce
from himo_kernels.info_nce.api import bias_and_flag, with_logit_bias
from himo_kernels.integrations.kinds import Kind, as_under_autocast, base_named, check_settings
from himo_kernels.sigmoid_loss import sigmoid_loss

Replacement = Callable[..., Any]

OPTIONS = ("strategy", "backend")
METHODS = ("forward", "get_logits", "get_ground_truth")  # of the class that is accelerated
SETTINGS = ("local_loss", "gather_with_grad", "world_size")  # of a ClipLoss, read at each call


def clip_forward(loss: Any, *, strategy: str = "gather", backend: str = "auto") -> Replacement:
    """Returns the new ClipLoss.forward."""
    _check("ClipLoss", loss, SETTINGS, strategy, backend)

    def forward(
        self: Any,
        image_features: Tensor,  # [M, D], L2-normalised by the model
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor | float,  # []
        logit_bias: Tensor | float | None = None,  # []
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        logit_bias, output_dict = bias_and_flag("ClipLoss", logit_bias, output_dict)
        value = _contrastive(self, image_features, text_features, logit_scale, strategy, backend)
        value = with_logit_bias(value, logit_bias)
        return {"contrastive_loss": value} if output_dict else value

    return forward


def coca_forward(loss: Any, *, strategy: str = "gather", backend: str = "auto") -> Replacement:
    """Returns the new CoCaLoss.forward: its caption loss stays open_clip's."""
    settings = (*SETTINGS, "clip_loss_weight", "caption_loss_weight", "caption_loss")
    _check("CoCaLoss", loss, settings, strategy, backend)

    def forward(
        self: Any,
        image_features: Tensor,  # [M, D], L2-normalised by the model
        text_features: Tensor,  # [M, D]
        logits: Tensor,  # [M, L, V] of the captions' tokens
        labels: Tensor,  # [M, L]
        logit_scale: Tensor | float,  # []
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        if self.clip_loss_weight:
            value = _contrastive(
                self, image_features, text_features, logit_scale, strategy, backend
            )
            value = self.clip_loss_weight * value
        else:
            value = torch.tensor(0, device=logits.device)
        caption = self.caption_loss_weight * self.caption_loss(logits.permute(0, 2, 1), labels)
        if output_dict:
            return {"contrastive_loss": value, "caption_loss": caption}
        return value, caption

    return forward


def siglip_forward(loss: Any, *, strategy: str = "gather", backend: str = "auto") -> Replacement:
    """Returns the new SigLipLoss.forward."""
    _check("SigLipLoss", loss, ("world_size",), strategy, backend)

    def forward(
        self: Any,
        image_features: Tensor,  # [M, D], L2-normalised by the model
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor | float,  # []
        logit_bias: Tensor | float | None,  # []
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        image, text = as_under_autocast(image_features, text_features)
        bias = 0.0 if logit_bias is None else logit_bias
        if self.world_size == 1:
            value = sigmoid_loss(image, text, logit_scale, bias, backend=backend)
        else:
            _check_world("SigLipLoss", self)
            value = distributed.sigmoid_loss(
                image, text, logit_scale, bias, strategy=strategy, backend=backend
            )
        return {"contrastive_loss": value} if output_dict else value

    return forward


KINDS = tuple(
    Kind(
        f"open_clip's {name}",
        partial(base_named, name=name, package="open_clip"),
        (*METHODS, *others),
        replacement,
        OPTIONS,
    )
    for name, others, replacement in (
        ("CoCaLoss", (), coca_forward),  # which derives from ClipLoss
        ("ClipLoss", (), clip_forward),
        ("SigLipLoss", ("_loss",), siglip_forward),
    )
)


def _check(name: str, loss: Any, settings: tuple[str, ...], strategy: str, backend: str) -> None:
    check_strategy("accelerate", strategy)
    check_backend("accelerate", backend)
    if getattr(loss, "use_horovod", False):  # removed from open_clip after 3.3.0
        raise NotImplementedError("accelerate: expected torch.distributed, got use_horovod=True")
    check_settings(name, loss, settings)


def _contrastive(
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    strategy: str,
    backend: str,
) -> Tensor:
    image_features, text_features = as_under_autocast(image_features, text_features)
    if loss.world_size == 1:
        return info_nce(image_features, text_features, logit_scale, backend=backend)
    return _over_ranks(loss, image_features, text_features, logit_scale, strategy, backend)


def _over_ranks(
    loss: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    strategy: str,
    backend: str,
) -> Tensor:
    members = _check_world("ClipLoss", loss)
    ranks = members.size
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


def _check_world(name: str, loss: Any) -> Members:
    members = members_of(None, name)
    if loss.world_size != members.size:
        expected = f"to be that of torch.distributed, {members.size}"
        raise_value(name, "world_size", expected, loss.world_size)
    return members


class _WeightedGradient(torch.autograd.Function):
    """x, with its gradient multiplied by a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.weight * grad, None
