"""The `cpu` backend of himo_loss: csrc/himo_loss.cpp, the component loss in R + 1 dimensions.

Equation numbers refer to README.md. The rank is on the CPU, so kept and dropped directions are
slices. Problems of a batch run one after the other.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from himo_kernels import extension
from himo_kernels.pca.cpu import why_not_decompose


def why_not(image_features: Tensor, *_: Tensor) -> str | None:
    """Returns why this backend cannot decompose texts of this shape, or None."""
    return why_not_decompose(image_features)


def himo_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    variance_threshold: Tensor,  # [] float64
    floor: Sequence[float],  # from pca.reference.floor_of
    normalize_components: bool,
    label_smoothing: float,
    *,
    products: Tensor | None = None,  # [2, *, N, N]
    factors: Tensor | None = None,  # [*, (2 N + D)(n + 1)]
) -> tuple[Tensor, ...]:
    """Returns loss [*], row and column nll [*, N] of both losses, then the decomposition."""
    settings = (variance_threshold.item(), floor, normalize_components, label_smoothing)
    return extension.load().himo_loss_fwd(
        image_features, text_features, logit_scale, *settings, products, factors
    )


def himo_loss_bwd(
    *arguments: Any,  # of the schema up to gap_eps
    products: Tensor | None = None,  # [2, *, N, N]
    factors: Tensor | None = None,  # [*, (2 N + D)(n + 1)]
) -> tuple[Tensor, ...]:
    """Returns the gradients of images, texts and logit_scale; empty where not needed."""
    *given, needs_grad = arguments
    needs_images, needs_texts, _ = needs_grad
    grads = extension.load().himo_loss_bwd(*given, needs_images, needs_texts, products, factors)
    inputs = given[2:5]
    return tuple(
        grad.to(value.dtype) if needed else value.new_empty(0)
        for grad, value, needed in zip(grads, inputs, needs_grad, strict=True)
    )
