"""sigmoid_loss: the pairwise sigmoid loss (SigLIP, arXiv 2303.15343)."""

import torch
from torch import Tensor

from himo_kernels._checks import (
    check_alike,
    check_finite_values,
    check_flag,
)
from himo_kernels.dispatch import apply_function
from himo_kernels.info_nce.api import check_scalar
from himo_kernels.sigmoid_loss.op import SIGMOID_LOSS, SigmoidLoss


def sigmoid_loss(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor | float,  # []
    logit_bias: Tensor | float,  # []
    *,
    check_finite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The sigmoid loss of all N^2 pairs, divided by N (SigLIP, algorithm 1).

    Equal to `-F.logsigmoid(z * l).sum() / N` with `l = logit_scale * image_features @
    text_features.T + logit_bias`, z = 1 on the diagonal and -1 elsewhere. Row i of the images and
    row i of the texts are a pair. Features are not normalised here: do so first for cosine
    similarities.

    The loss and its gradients are computed together, in one pass over the logits. So an input that
    requires a gradient makes the forward longer; under torch.no_grad there is the loss alone.

    Args:
        image_features: [*, N, D], N and D >= 1, float16, bfloat16, float32 or float64.
        text_features: [*, N, D], dtype and device of image_features. Leading dimensions are
            independent problems.
        logit_scale: The multiplier s itself (already exponentiated, as in open_clip), a tensor of
            one element or a number.
        logit_bias: b, a tensor of one element or a number; -10 at the start of SigLIP's training.
        check_finite: Raise on NaN or inf instead of returning NaN (synchronises with the device).
        backend: "auto", "reference", "cpu" or "triton". A named backend never falls back.

    Returns:
        Loss [*], float32, or float64 for float64 features. Logits and sums have the same dtype.
        Differentiable once with respect to the features, logit_scale and logit_bias.

    Raises:
        ValueError: wrong shape or value.
        TypeError: wrong type or dtype.
        NotImplementedError: the named backend cannot take the features.
    """
    name = SIGMOID_LOSS.name
    features = {"image_features": image_features, "text_features": text_features}
    check_alike(name, features)
    scale = check_scalar(name, "logit_scale", logit_scale, image_features)
    bias = check_scalar(name, "logit_bias", logit_bias, image_features)
    if check_flag(name, "check_finite", check_finite):
        check_finite_values(name, **features, logit_scale=scale, logit_bias=bias)
    inputs = (image_features, text_features, scale, bias)
    backend = SIGMOID_LOSS.resolve(backend, *inputs)
    # Asked here, because no gradient is enabled inside an autograd.Function.
    enabled = torch.is_grad_enabled()
    needs_grad = [enabled and value.requires_grad for value in inputs]
    return apply_function(SigmoidLoss, needs_grad, backend, *inputs)
