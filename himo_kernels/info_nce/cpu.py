"""The `cpu` backend of info_nce and its dual forms: csrc/info_nce.cpp, one loss at a time.

It computes the logits in tiles instead of materialising them, both directions share each tile, and
the low-rank form multiplies K columns instead of D.
"""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor

from himo_kernels import extension
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.info_nce.compose import (
    Direction,
    Factors,
    Gradients,
    Loss,
    Needs,
    Settings,
    Statistics,
)
from himo_kernels.memory import SMALL
from himo_kernels.process_state import matmuls_are_full_float32


def fwd(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    if isinstance(loss.keys, Factors):
        return _low_rank_fwd(loss, loss.keys)
    return extension.load().info_nce_fwd(
        loss.image_features,
        loss.keys,
        loss.logit_scale,
        loss.settings.label_smoothing,
        loss.products,
    )


def plain(
    features: tuple[Tensor, ...],  # [*, N, D] each, image_features first
    logit_scale: Tensor | float,
    label_smoothing: float,
    differentiate_keys: bool,
) -> tuple[Tensor, ...] | None:
    """Returns the loss [*] of the images against each of the other features.

    Returns None if the call is not plain (Operator.plain), or an argument is not valid or of
    another type than those above, or the logits to cache for a gradient are not small.
    """
    if extension.why_not() is not None or not matmuls_are_full_float32("cpu"):
        return None
    call = extension.load().info_nce_plain
    return call(features, logit_scale, label_smoothing, differentiate_keys, SMALL)


def bwd(loss: Loss, statistics: Statistics, needs: Needs, add_to: Gradients) -> Gradients:
    """Returns the gradients in the accumulation dtype; accumulates images in place in add_to."""
    if isinstance(loss.keys, Factors):
        return _low_rank_bwd(loss, loss.keys, statistics, needs, add_to)
    images, keys, scale = extension.load().info_nce_bwd(
        statistics.grad_loss,
        loss.image_features,
        loss.keys,
        loss.logit_scale,
        statistics.row_nll,
        statistics.column_nll,
        *loss.settings,
        needs.images,
        *needs.keys,
        loss.products,
        add_to.images if needs.images else None,
    )
    return Gradients(images, scale if add_to.scale is None else add_to.scale + scale, (keys,))


def _low_rank_fwd(loss: Loss, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(loss.image_features.dtype)
    *batch, samples, _ = loss.image_features.shape
    value, row_nll, column_nll = (
        loss.image_features.new_empty(shape, dtype=dtype)
        for shape in (batch, (*batch, samples), (*batch, samples))
    )
    for own, own_factors, *out in _problems(loss, factors, value, row_nll, column_nll):
        dense = _dense(own, own_factors, _projects(own_factors))
        for target, computed in zip(out, fwd(dense), strict=True):
            target.copy_(computed)
    return value, row_nll, column_nll


def _low_rank_bwd(
    loss: Loss, factors: Factors, statistics: Statistics, needs: Needs, add_to: Gradients
) -> Gradients:
    dtype = accumulation_dtype(loss.image_features.dtype)
    like = (loss.image_features, factors.coefficients, factors.basis)
    images, coefficients, basis = (x.new_zeros(x.shape, dtype=dtype) for x in like)
    if needs.images and add_to.images is not None:
        images = add_to.images
    scale = add_to.scale
    for own, own_factors, grad_images, grad_coefficients, grad_basis, *of_own in _problems(
        loss, factors, images, coefficients, basis, *statistics
    ):
        rank = own_factors.basis.shape[0]
        # dV and dB both follow from the gradient of the projections V B^T, unless keys are
        # constants: V and B then need different halves of dS, which only the dense form computes.
        project = loss.settings.differentiate_keys and _projects(own_factors)
        grads = bwd(
            _dense(own, own_factors, project),
            Statistics(*of_own),
            Needs(images=True, keys=(True,), scale=True),
            Gradients(None if project else grad_images, scale),
        )
        grad_query, grad_key = cast(Tensor, grads.images), cast(Tensor, grads.keys[0])  # requested
        scale = grads.scale
        if project:
            grad_images.addmm_(grad_query, own_factors.basis)
            grad_coefficients[:, :rank] = grad_key
            grad_basis[:rank] = grad_query.mT @ own.image_features
        else:
            grad_coefficients[:, :rank] = grad_key @ own_factors.basis.mT
            grad_basis[:rank] = own_factors.coefficients.mT @ grad_key
    return Gradients(images, scale, (coefficients, basis))


def _dense(loss: Loss, factors: Factors, project: bool) -> Loss:
    # V (C B)^T = (V B^T) C^T: the inner dimension is R if V is projected, else D.
    image, (coefficients, basis, _) = loss.image_features, factors
    query, key = (image @ basis.mT, coefficients) if project else (image, coefficients @ basis)
    return loss._replace(image_features=query, keys=key)


def _projects(factors: Factors) -> bool:
    # Whether V B^T has fewer columns than V.
    rank, features = factors.basis.shape
    return rank < features


def _problems(loss: Loss, factors: Factors, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    # Yields each problem: its loss, its first R coefficients and rows of the basis, all in the
    # accumulation dtype, and views of the others [*, ...]. Reading a rank on the CPU needs no sync.
    dtype = accumulation_dtype(loss.image_features.dtype)
    coefficients, basis, rank = factors

    def of_each(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, *tensor.shape[rank.dim() :])

    images, coefficients, basis, *flat = map(
        of_each, (loss.image_features, coefficients, basis, *others)
    )
    products = None if loss.products is None else of_each(loss.products)
    for index, own_rank in enumerate(rank.clamp(0, coefficients.shape[-1]).reshape(-1).tolist()):
        own = loss._replace(
            image_features=images[index].to(dtype),
            products=None if products is None else products[index],
        )
        own_factors = Factors(
            coefficients[index, :, :own_rank].to(dtype), basis[index, :own_rank].to(dtype), rank
        )
        yield own, own_factors, *(tensor[index] for tensor in flat)


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) over the negatives of rows [M] and of columns [N]."""
    return extension.load().info_nce_block_fwd(
        image_features, keys, logit_scale, row_positives, column_positives, offset
    )


def info_nce_block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    rows: Direction,  # [M] each
    columns: Direction,  # [N] each
    offset: int,
    settings: Settings,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s."""
    return extension.load().info_nce_block_bwd(
        image_features,
        keys,
        logit_scale,
        *rows,
        *columns,
        offset,
        settings.label_smoothing,
        total,
        settings.differentiate_keys,
    )
