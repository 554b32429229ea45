"""The CLIP model of the released HiMo-CLIP code, whose forward computes the two losses.

Written for the interface at commit f235e97: `forward(image, text_long, rank, pca_ratio)` returns
the contrastive and the component loss of this rank's rows.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from himo_kernels._checks import check_number
from himo_kernels.integrations.kinds import Kind
from himo_kernels.nn import HiMoLoss

# HiMoLoss's arguments, except what the trainer sets: pca_ratio and the sum of the two losses.
OPTIONS = tuple(
    name
    for name in inspect.signature(HiMoLoss).parameters
    if name not in ("variance_threshold", "contrastive_weight", "component_weight")
)
METHODS = ("forward", "cumratio_PCA")


def class_of(module: nn.Module) -> type | None:
    """Returns module's base class that defines cumratio_PCA, if module has the rest of a CLIP.

    Checks classes, not instances: wrappers (torch.compile, FSDP, PEFT) forward attribute access to
    the model, but have another forward.
    """
    encoders = hasattr(type(module), "encode_image") and hasattr(type(module), "encode_text")
    if encoders and hasattr(module, "logit_scale"):
        for kind in reversed(type(module).__mro__):
            if "cumratio_PCA" in vars(kind):
                return kind
    return None


def forward_of(model: nn.Module, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns the new CLIP.forward. Options as in HiMoLoss, with the preset "official"."""
    options = {"preset": "official", **options}
    losses: dict[float, HiMoLoss] = {}  # by pca_ratio

    def loss_of(ratio: float) -> HiMoLoss:
        ratio = check_number("HiMo-CLIP's forward", "pca_ratio", ratio)
        if ratio not in losses:
            losses[ratio] = HiMoLoss(variance_threshold=ratio, **options)
        return losses[ratio]

    loss_of(0.85)  # so that wrong options raise here, not in the first step

    def forward(
        self: Any,
        image: Tensor,  # [M, 3, H, W]
        text_long: Tensor,  # [M, L]
        rank: int,  # unused: the rank of torch.distributed, where the caller got it
        pca_ratio: float = 0.85,
    ) -> tuple[Tensor, Tensor]:
        terms = loss_of(pca_ratio).terms(
            self.encode_image(image), self.encode_text(text_long), self.logit_scale.exp()
        )
        return terms.contrastive_loss, terms.component_loss

    return forward


KINDS = (
    Kind("the CLIP model of the released HiMo-CLIP code", class_of, METHODS, forward_of, OPTIONS),
)
