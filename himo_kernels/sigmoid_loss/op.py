"""Schema, fake and autograd of sigmoid_loss, and its block for a loss over ranks.

The gradient of this loss needs no statistics of rows or columns. So the forward returns the
gradients too, from the same products, and the backward only multiplies them by the gradient of the
loss: 6 N^2 D FLOPs, where a backward that recomputes the logits would make it 8.
"""

from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward
from himo_kernels.sigmoid_loss import cpu, reference

_TRITON = "himo_kernels.sigmoid_loss.triton"

SIGMOID_LOSS = Operator(
    "sigmoid_loss",
    {
        "triton": _triton.backend(_TRITON, "sigmoid_loss", _triton.why_not, parts=("fwd",)),
        "cpu": Backend.of(cpu, "sigmoid_loss", extension.why_not_for, parts=("fwd",)),
        "reference": Backend.of(reference, "sigmoid_loss", parts=("fwd",)),
    },
)
# Images [M, D] against keys [N, D], in which row i and column i + offset are a pair: the part of a
# loss over ranks that one rank computes. Losses and gradients are sums, not divided.
BLOCK = Operator(
    "sigmoid_loss_block",
    {
        "triton": _triton.backend(_TRITON, "sigmoid_loss_block", _triton.why_not, parts=("fwd",)),
        "cpu": Backend.of(cpu, "sigmoid_loss_block", extension.why_not_for, parts=("fwd",)),
        "reference": Backend.of(reference, "sigmoid_loss_block", parts=("fwd",)),
    },
    public=False,
)


def _fwd_fake(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    needs_grad: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    batch = image_features.shape[:-2]
    dtype = accumulation_dtype(image_features.dtype)
    shapes = (image_features.shape, text_features.shape, batch, batch)
    grads = (
        image_features.new_empty(shape if needed else 0, dtype=dtype)
        for shape, needed in zip(shapes, needs_grad, strict=True)
    )
    return image_features.new_empty(batch, dtype=dtype), *grads


# Returns the loss [*] and its gradients, float32 or float64: of images and texts [*, N, D], of
# scale and bias for each problem [*]. Those that are not needed are empty.
_FWD = SIGMOID_LOSS.define(
    "fwd",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias, "
    "bool[] needs_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)


class SigmoidLoss(torch.autograd.Function):
    """sigmoid_loss. Saves the gradients of the loss, not the inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        needs_grad: list[bool],
        backend: str,
        *inputs: Tensor,  # images, texts [*, N, D], scale, bias []
    ) -> Tensor:
        loss, *grads = _FWD(*inputs, needs_grad, backend)
        ctx.save_for_backward(*grads)
        ctx.needs_grad, ctx.dtypes = needs_grad, [value.dtype for value in inputs]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:  # [*]
        refuse_double_backward(SIGMOID_LOSS.name)
        of_features = grad_loss[..., None, None]
        grads: list[Tensor | None] = []
        for index, grad in enumerate(ctx.saved_tensors):
            if not ctx.needs_grad[index]:
                grads.append(None)
                continue
            weighted = of_features * grad if index < 2 else (grad_loss * grad).sum()
            grads.append(weighted.to(ctx.dtypes[index]))
        return None, None, *grads
