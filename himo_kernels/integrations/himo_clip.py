"""The CLIP model of the released HiMo-CLIP code, whose forward computes its two losses.

Written for its interface at commit f235e97: `forward(image, text_long, rank, pca_ratio)` returns
the contrastive and the component loss of this rank's rows.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from himo_kernels.nn import HiMoLoss

# HiMoLoss's, but for what the trainer decides: pca_ratio and the sum of the two losses.
OPTIONS = tuple(
    name
    for name in inspect.signature(HiMoLoss).parameters
    if name not in ("variance_threshold", "component_weight")
)
METHODS = ("forward", "cumratio_PCA")


def class_of(module: nn.Module) -> type | None:
    """Returns the most basic of module's classes with a cumratio_PCA, if all else is there too.

    Asked of classes: a wrapper (of torch.compile, FSDP, PEFT) shows a model's attributes as its
    own, and its forward is not the model's.
    """
    encoders = hasattr(type(module), "encode_image") and hasattr(type(module), "encode_text")
    if encoders and hasattr(module, "logit_scale"):
        for kind in reversed(type(module).__mro__):
            if "cumratio_PCA" in vars(kind):
                return kind
    return None


def forward_of(model: nn.Module, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns what CLIP.forward becomes. Options are HiMoLoss's; the preset is "official"."""
    options = {"preset": "official", **options}
    losses: dict[float, HiMoLoss] = {}  # by pca_ratio

    def loss_of(ratio: float) -> HiMoLoss:
        if ratio not in losses:
            losses[ratio] = HiMoLoss(variance_threshold=ratio, **options)
        return losses[ratio]

    loss_of(0.85)  # options that are wrong raise here, not in the first step

    def forward(
        self: Any,
        image: Tensor,  # [M, 3, H, W]
        text_long: Tensor,  # [M, L]
        rank: int,  # of the caller; torch.distributed's is used, which it was made from
        pca_ratio: float = 0.85,
    ) -> tuple[Tensor, Tensor]:
        terms = loss_of(pca_ratio).terms(
            self.encode_image(image), self.encode_text(text_long), self.logit_scale.exp()
        )
        return terms.contrastive_loss, terms.component_loss

    return forward
