"""The `cpu` backend of himo_loss: csrc/himo_loss.cpp, the component loss in R + 1 dimensions.

Equation numbers refer to README.md. The rank is on the CPU, so kept and dropped directions are
slices. Problems of a batch run one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himo_kernels import extension
from himo_kernels.memory import SMALL
from himo_kernels.pca.cpu import why_not_decompose
from himo_kernels.process_state import matmuls_are_full_float32


def why_not(image_features: Tensor, *_: Tensor) -> str | None:
    """Returns why this backend cannot decompose texts of this shape, or None."""
    return why_not_decompose(image_features)


def plain(
    features: tuple[Tensor, Tensor],  # image_features and text_features [*, N, D]
    logit_scale: Tensor | float,
    normalize_features: bool,
    *options: float | str | bool,  # from variance_threshold to gap_eps, as in api.himo_loss
) -> tuple[Tensor, ...] | None:
    """Returns both losses [*] and the rank [*], of the normalised features if they are to be.

    Returns None if the call is not plain (Operator.plain), or an argument is not valid or of
    another type than those above, or what to cache for a gradient is not small.
    """
    if not torch._C.has_lapack or extension.why_not() is not None:
        return None
    if not matmuls_are_full_float32("cpu"):
        return None
    given = (features, logit_scale, normalize_features, *options, SMALL)
    return extension.load().himo_loss_plain(*given)


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
