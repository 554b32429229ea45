"""One loss on Triton: fwd and bwd as himo_kernels/info_nce/compose.py takes them."""

import torch
from torch import Tensor

from himo_kernels.info_nce.compose import Factors, Gradients, Loss, Needs, Statistics
from himo_kernels.info_nce.triton import gradients as pass_2
from himo_kernels.info_nce.triton.branch import factors_branch, features_branch, kept_factors
from himo_kernels.info_nce.triton.products import bounded_product
from himo_kernels.info_nce.triton.statistics import losses


def fwd(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    image, keys = loss.image_features, loss.keys
    if isinstance(keys, Factors):
        branch = factors_branch(kept_factors(image, keys), loss.logit_scale)
    else:
        branch = features_branch(image, keys, loss.logit_scale)
    value, row_nll, column_nll = losses(branch, loss.settings.label_smoothing)
    *batch, samples, _ = image.shape
    nll_shape = (*batch, samples)
    return value.reshape(batch), row_nll.reshape(nll_shape), column_nll.reshape(nll_shape)


def bwd(loss: Loss, statistics: Statistics, needs: Needs, add_to: Gradients) -> Gradients:
    """Returns the gradients; that of images is padded [B, N, W] and float32 before the last."""
    image, keys = loss.image_features, loss.keys
    if isinstance(keys, Factors):
        return _low_rank_bwd(loss, keys, statistics, needs, add_to)
    grads = pass_2.gradients(
        features_branch(image, keys, loss.logit_scale),
        statistics,
        loss.settings,
        pass_2.Needs(left=needs.images, right=needs.keys[0], scale=needs.scale),
        add_to=pass_2.Gradients(left=add_to.images, scale=add_to.scale),
        left_dtype=image.dtype if needs.last else torch.float32,
    )
    images = _unpadded(grads.left, image) if needs.last else grads.left
    return Gradients(images, grads.scale, (_unpadded(grads.right, keys),))


def _low_rank_bwd(
    loss: Loss, keys: Factors, statistics: Statistics, needs: Needs, add_to: Gradients
) -> Gradients:
    factors = kept_factors(loss.image_features, keys)
    needs_coefficients, needs_basis = needs.keys
    grads = pass_2.gradients(
        factors_branch(factors, loss.logit_scale),
        statistics,
        loss.settings,
        pass_2.Needs(
            left=needs.images,
            left_keys=needs_basis,
            right=needs_coefficients,
            scale=needs.scale,
        ),
        add_to=pass_2.Gradients(scale=add_to.scale),
    )
    # X = V B^T: dV = dX B and dB = dX^T V. B belongs to the texts, so what it gets where keys are
    # constants is the part of dX in which the texts are queries: that of the columns.
    images = add_to.images
    if grads.left is not None:
        if images is None:
            images = torch.zeros_like(factors.image, dtype=torch.float32)
        bounded_product(grads.left, factors.basis, factors.rank, "inner", images, accumulate=True)
    basis = None
    if grads.left_keys is not None:
        basis = torch.empty_like(factors.basis, dtype=torch.float32)
        bounded_product(grads.left_keys.mT, factors.image, factors.rank, "rows", basis)
    return Gradients(
        _unpadded(images, loss.image_features) if needs.last else images,
        grads.scale,
        (_unpadded(grads.right, keys.coefficients), _unpadded(basis, keys.basis)),
    )


def _unpadded(grad: Tensor | None, value: Tensor) -> Tensor | None:
    # The gradient [B, N, W] in the shape of value.
    if grad is None:
        return None
    return grad[:, : value.shape[-2], : value.shape[-1]].reshape(value.shape)
