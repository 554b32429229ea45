"""The `triton` backend of info_nce, its dual forms and its blocks. Not yet run on hardware.

logits.py defines the operands of one loss, losses.py is pass 1, grad_logits.py and gradients.py are
pass 2, low_rank.py has the factors and their products, tiles.py the tile sizes. In each file the
kernels follow the functions that launch them.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from himo_kernels.aot import Case
from himo_kernels.info_nce.compose import (
    Direction,
    Factors,
    Gradients,
    Loss,
    Needs,
    Settings,
    Statistics,
    passes,
)
from himo_kernels.info_nce.triton import gradients as pass_2
from himo_kernels.info_nce.triton import losses as pass_1
from himo_kernels.info_nce.triton.logits import features_branch
from himo_kernels.info_nce.triton.low_rank import bounded_product, factors_branch, masked_factors

__all__ = [
    "aot_cases",
    "dual_info_nce_bwd",
    "dual_info_nce_fwd",
    "dual_info_nce_low_rank_bwd",
    "dual_info_nce_low_rank_fwd",
    "info_nce_block_bwd",
    "info_nce_block_fwd",
    "info_nce_bwd",
    "info_nce_fwd",
]


def fwd(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    image, keys = loss.image_features, loss.keys
    if isinstance(keys, Factors):
        branch = factors_branch(masked_factors(image, keys), loss.logit_scale)
    else:
        branch = features_branch(image, keys, loss.logit_scale)
    value, row_nll, column_nll = pass_1.losses(branch, loss.settings.label_smoothing)
    *batch, samples, _ = image.shape
    nll_shape = (*batch, samples)
    return value.reshape(batch), row_nll.reshape(nll_shape), column_nll.reshape(nll_shape)


def bwd(loss: Loss, statistics: Statistics, needs: Needs, add_to: Gradients) -> Gradients:
    """Returns the gradients. Before the last loss, images is padded [B, N, W] and float32."""
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
    factors = masked_factors(loss.image_features, keys)
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
    # X = V B^T: dV = dX B and dB = dX^T V. With constant keys the basis, which is part of the
    # texts, gets only the column part of dX, in which the texts are the queries.
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
    # Returns the gradient [B, N, W] in the shape of value.
    if grad is None:
        return None
    return grad[:, : value.shape[-2], : value.shape[-1]].reshape(value.shape)


info_nce_fwd, info_nce_bwd = passes("info_nce", fwd, bwd).values()
dual_info_nce_fwd, dual_info_nce_bwd = passes("dual_info_nce", fwd, bwd).values()
dual_info_nce_low_rank_fwd, dual_info_nce_low_rank_bwd = passes(
    "dual_info_nce_low_rank", fwd, bwd
).values()


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M] float32
    column_positives: Tensor,  # [N] float32
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) over the negatives of rows [M] and of columns [N]."""
    branch = features_branch(image_features, keys, logit_scale, offset)
    return pass_1.log_odds(branch, row_positives, column_positives)


def info_nce_block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    rows: Direction,  # [M] float32 each
    columns: Direction,  # [N] float32 each
    offset: int,
    settings: Settings,
    total: int,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s."""
    # Divided by the largest weight, because the weights of a mean over N are too small for float16.
    weights = cast(Tensor, rows.weight), cast(Tensor, columns.weight)
    largest = torch.cat(weights).abs().amax(0, keepdim=True)
    largest = largest.clamp_min(torch.finfo(largest.dtype).tiny)  # [1]
    grad_images, grad_keys = pass_2.block_gradients(
        features_branch(image_features, keys, logit_scale, offset),
        _direction(rows, weights[0] / largest),
        _direction(columns, weights[1] / largest),
        largest,
        settings,
        total,
    )
    features = image_features.shape[1]
    return grad_images[0, :, :features], grad_keys[0, :, :features]


def _direction(direction: Direction, weight: Tensor) -> Direction:
    # As a batch of one problem, [1, n] each, with this weight.
    vectors = (direction.positives, direction.nll, weight)
    return Direction(*(vector.unsqueeze(0).contiguous() for vector in vectors))


def aot_cases() -> Iterator[Case]:
    """Yields the launches that himo_kernels.aot compiles: both tiles, all dtypes and branches."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for samples in (8192, 128):
            label = f"info_nce {str(dtype)[6:]}, N={samples}"
            yield Case(label, partial(_info_nce, samples, dtype))
            yield Case(f"{label}, low rank", partial(_low_rank, samples, dtype))
        # Blocks of two ranks. The smaller one has a row count and an offset not divisible by 16.
        for rows, keys, offset in ((4096, 8192, 4096), (120, 257, 137)):
            label = f"info_nce_block {str(dtype)[6:]}, {rows}x{keys}"
            run = partial(_block, rows, keys, offset, dtype)
            yield Case(label, run, ragged=rows % 16 > 0)
    label = "info_nce bfloat16, N=8192, constant keys"
    yield Case(label, partial(_info_nce, 8192, torch.bfloat16, differentiate_keys=False))
    run = partial(_block, 4096, 8192, 4096, torch.bfloat16, differentiate_keys=False)
    yield Case("info_nce_block bfloat16, 4096x8192, constant keys", run)


def _info_nce(samples: int, dtype: torch.dtype, differentiate_keys: bool = True) -> None:
    features, scale = _meta(samples, 768, dtype=dtype), _meta()
    inputs = (features, features, scale)
    loss, *nlls = info_nce_fwd(*inputs, 0.0)
    arguments: tuple[Any, ...] = (loss, *inputs, *nlls, 0.0, differentiate_keys, [True] * 3)
    info_nce_bwd(*arguments)


def _low_rank(samples: int, dtype: torch.dtype) -> None:
    features, scale = _meta(samples, 768, dtype=dtype), _meta()
    coefficients, basis = _meta(samples, 257, dtype=dtype), _meta(257, 768, dtype=dtype)
    inputs = (features, features, coefficients, basis, _meta(dtype=torch.int64), scale)
    outputs = dual_info_nce_low_rank_fwd(*inputs, 0.0)
    nlls = [output for index, output in enumerate(outputs) if index % 3]
    arguments: tuple[Any, ...] = (*outputs[::3], *inputs, *nlls, 0.0, True, [True] * 5)
    dual_info_nce_low_rank_bwd(*arguments)


def _block(
    rows: int, keys: int, offset: int, dtype: torch.dtype, differentiate_keys: bool = True
) -> None:
    features = _meta(rows, 768, dtype=dtype), _meta(keys, 768, dtype=dtype)
    of_rows, of_keys = _meta(rows), _meta(keys)
    info_nce_block_fwd(*features, _meta(), of_rows, of_keys, offset)
    directions = (Direction(*(of_rows,) * 3), Direction(*(of_keys,) * 3))
    settings = (offset, Settings(0.1, differentiate_keys), keys)
    arguments: tuple[Any, ...] = (*features, _meta(), *directions, *settings)
    info_nce_block_bwd(*arguments)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
