"""The specification of sigmoid_loss and of its blocks: plain PyTorch, any float dtype.

l = s V U^T + b                                       logits [*, M, N]
z_ij = 1 at the pairs, -1 elsewhere
L = sum_ij -log sigmoid(z_ij l_ij)          dL/dl = -z sigmoid(-z l)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels.info_nce.reference import pairs_of, row_parts


def sigmoid_loss_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the loss [*] and its gradients; empty where not needed."""
    samples = image_features.shape[-2]
    sums = sigmoid_loss_block_fwd(
        image_features, text_features, logit_scale, logit_bias, 0, needs_grad
    )
    return tuple(value / samples for value in sums)


def sigmoid_loss_block_fwd(
    image_features: Tensor,  # [*, M, D]
    keys: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    logit_bias: Tensor,  # []
    offset: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Returns the sum of the losses [*] and its gradients; empty where not needed.

    Row i and column i + offset are a pair, if there is such a column.
    """
    dtype = accumulation_dtype(image_features.dtype)
    images, keys, scale, bias = (
        x.to(dtype) for x in (image_features, keys, logit_scale, logit_bias)
    )
    batch = images.shape[:-2]
    loss, grad_scale, grad_bias = (images.new_zeros(batch) for _ in range(3))
    grad_images, grad_keys = torch.empty_like(images), torch.zeros_like(keys)
    for part in row_parts(images, keys):
        products = images[..., part, :] @ keys.mT
        z = torch.full_like(products, -1.0)
        pairs_of(z, part.start + offset).fill_(1.0)
        margins = z * (scale * products + bias)
        loss -= F.logsigmoid(margins).sum((-2, -1))
        if not any(needs_grad):
            continue
        grad_logits = -z * torch.sigmoid(-margins)
        grad_images[..., part, :] = scale * grad_logits @ keys
        grad_keys += scale * grad_logits.mT @ images[..., part, :]
        grad_scale += (grad_logits * products).sum((-2, -1))
        grad_bias += grad_logits.sum((-2, -1))
    grads = (grad_images, grad_keys, grad_scale, grad_bias)
    return loss, *(
        grad if needed else grad.new_empty(0)
        for grad, needed in zip(grads, needs_grad, strict=True)
    )
