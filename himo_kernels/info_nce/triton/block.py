"""A block of the logits of a larger batch: signatures and results of reference.py."""

import torch
from torch import Tensor

from himo_kernels.info_nce.compose import Settings
from himo_kernels.info_nce.triton.branch import features_branch
from himo_kernels.info_nce.triton.gradients import Direction, block_gradients
from himo_kernels.info_nce.triton.statistics import log_odds


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M] float32
    column_positives: Tensor,  # [N] float32
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) of rows [M] and of columns [N], without pairs."""
    branch = features_branch(image_features, keys, logit_scale, offset)
    return log_odds(branch, row_positives, column_positives)


def info_nce_block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M] float32, as all of these
    row_nll: Tensor,  # [M]
    row_weight: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    column_nll: Tensor,  # [N]
    column_weight: Tensor,  # [N]
    offset: int,
    label_smoothing: float,
    total: int,
    differentiate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s."""
    # In units of the largest weight: those of a mean over N are too small for float16.
    unit = torch.cat([row_weight, column_weight]).abs().amax(0, keepdim=True)
    unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)  # [1]
    grad_images, grad_keys = block_gradients(
        features_branch(image_features, keys, logit_scale, offset),
        _direction(row_positives, row_nll, row_weight / unit),
        _direction(column_positives, column_nll, column_weight / unit),
        unit,
        Settings(label_smoothing, differentiate_keys),
        total,
    )
    features = image_features.shape[1]
    return grad_images[0, :, :features], grad_keys[0, :, :features]


def _direction(*vectors: Tensor) -> Direction:  # [n] each
    return Direction(*(vector.unsqueeze(0).contiguous() for vector in vectors))
