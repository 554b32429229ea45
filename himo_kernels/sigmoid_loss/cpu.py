"""The `cpu` backend of sigmoid_loss: csrc/sigmoid_loss.cpp, one tile of logits at a time."""

from collections.abc import Sequence

from torch import Tensor

from himo_kernels import extension


def sigmoid_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the loss [*] and its gradients; empty where not needed."""
    inputs = (image_features, text_features, logit_scale, logit_bias)
    return _sums(*inputs, 0, image_features.shape[-2], needs_grad)


def sigmoid_loss_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the sum of the losses [] and its gradients; empty where not needed."""
    return _sums(image_features, keys, logit_scale, logit_bias, offset, 1, needs_grad)


def _sums(
    image_features: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    offset: int,
    divisor: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    needs_images, needs_keys, needs_scale, needs_bias = needs_grad
    loss, grad_images, grad_keys, grad_scale, grad_bias = extension.load().sigmoid_loss_fwd(
        image_features,
        keys,
        logit_scale,
        logit_bias,
        offset,
        divisor,
        needs_images,
        needs_keys,
        needs_scale or needs_bias,
    )
    return (
        loss,
        grad_images,
        grad_keys,
        grad_scale if needs_scale else loss.new_empty(0),
        grad_bias if needs_bias else loss.new_empty(0),
    )
