"""The specification of one info_nce loss and of its blocks: plain PyTorch, any float dtype.

S = s V U^T [*, N, N]. Probabilities are computed relative to the positive, from S_ij - S_ii, and
each row saves nll_i = -log P_ii = log(1 + sum_{j != i} exp(S_ij - S_ii)). This is accurate for a
confident positive (P_ii = 0.999 at s = 100). Log-sum-exp minus S_ii, the difference of two numbers
near 100, has only two or three correct digits in float32.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

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

# Maximum number of logits of a block computed at once, or the size of its images if that is larger:
# 16 MiB in float32.
_BLOCK_LOGITS = 1 << 22


def fwd(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    image, keys, scale = _operands(loss)
    logits = scale * (image @ keys.mT)  # [*, N, N]
    positives = logits.diagonal(dim1=-2, dim2=-1)  # [*, N]
    row_nll = _nll(logits, positives)
    column_nll = _nll(logits.mT, positives)
    # HiMo-CLIP eq. (2). Both directions share the smoothing term, which has the mean of all logits.
    smoothing = loss.settings.label_smoothing * (positives.mean(-1) - logits.mean((-2, -1)))
    return (row_nll + column_nll).mean(-1) / 2 + smoothing, row_nll, column_nll


def bwd(loss: Loss, statistics: Statistics, needs: Needs, add_to: Gradients) -> Gradients:
    """Returns all gradients in the dtype of the logits, ignoring needs."""
    label_smoothing, differentiate_keys = loss.settings
    image, keys, scale = _operands(loss)
    products = image @ keys.mT
    logits = scale * products
    positives = logits.diagonal(dim1=-2, dim2=-1)
    weight = (statistics.grad_loss / (2 * logits.shape[-1]))[..., None, None]
    grad_rows = weight * _grad_logits(logits, positives, statistics.row_nll, label_smoothing)
    grad_columns = _grad_logits(logits.mT, positives, statistics.column_nll, label_smoothing)
    grad_columns = weight * grad_columns.mT
    grad_logits = grad_rows + grad_columns
    grad_images = scale * (grad_logits if differentiate_keys else grad_rows) @ keys
    grad_keys = scale * (grad_logits if differentiate_keys else grad_columns).mT @ image
    grad_scale = (grad_logits * products).sum()
    if add_to.images is not None:
        grad_images = add_to.images + grad_images
    if add_to.scale is not None:
        grad_scale = add_to.scale + grad_scale
    if not isinstance(loss.keys, Factors):
        return Gradients(grad_images, grad_scale, (grad_keys,))
    coefficients, basis = _first_factors(loss.keys, image.dtype)
    return Gradients(grad_images, grad_scale, (grad_keys @ basis.mT, coefficients.mT @ grad_keys))


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) over the negatives of rows [M] and of columns [N].

    Row i and column i + offset are a pair, if there is such a column.
    """
    images, keys, scale = _raised(image_features, keys, logit_scale)
    rows = torch.empty_like(row_positives)
    columns = torch.full_like(column_positives, -torch.inf)
    for part in row_parts(images, keys):
        logits = scale * (images[part] @ keys.mT)
        pairs_of(logits, part.start + offset).fill_(-torch.inf)
        rows[part] = torch.logsumexp(logits - row_positives[part, None], 1)
        columns = torch.logaddexp(columns, torch.logsumexp(logits - column_positives, 0))
    return rows, columns


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
    images, keys, scale = _raised(image_features, keys, logit_scale)
    grad_images, grad_keys = torch.empty_like(images), torch.zeros_like(keys)
    label_smoothing, differentiate_keys = settings
    row_weight, column_weight = cast(Tensor, rows.weight), cast(Tensor, columns.weight)
    share = label_smoothing / total
    for part in row_parts(images, keys):
        logits = scale * (images[part] @ keys.mT)
        pairs = pairs_of(logits, part.start + offset)
        first = max(0, part.start + offset)  # first column whose pair is in this part
        own_columns = slice(first, first + len(pairs))
        own_rows = slice(first - offset, first - offset + len(pairs))
        # dL/dS of the rows: P - (1 - eps) I - eps / N, with P_ii - 1 = expm1(-nll_i).
        grad_rows = (logits - rows.positives[part, None]).sub_(rows.nll[part, None]).exp_()
        own_pairs = pairs_of(grad_rows, part.start + offset)
        own_pairs.copy_(torch.expm1(-rows.nll[own_rows]) + label_smoothing)
        grad_rows.sub_(share).mul_(row_weight[part, None])
        grad_columns = logits.sub_(columns.positives).sub_(columns.nll).exp_()
        pairs.copy_(torch.expm1(-columns.nll[own_columns]) + label_smoothing)
        grad_columns.sub_(share).mul_(column_weight)
        if differentiate_keys:
            grad_rows = grad_columns = grad_rows + grad_columns
        grad_images[part] = grad_rows @ keys
        grad_keys += grad_columns.mT @ images[part]
    return grad_images, grad_keys


def row_parts(images: Tensor, keys: Tensor) -> Iterator[slice]:  # [*, M, D], [*, N, D]
    """Yields slices of the rows, so short that their logits fit the limit."""
    *batch, rows, _ = images.shape
    row_logits = max(1, math.prod(batch)) * keys.shape[-2]
    step = max(1, max(_BLOCK_LOGITS, images.numel()) // row_logits)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def pairs_of(logits: Tensor, offset: int) -> Tensor:  # [*, M, N]
    """Returns the entries (i, i + offset) of logits as a view, which may be empty."""
    rows, columns = logits.shape[-2:]
    first, last = max(0, -offset), min(rows, columns - offset)
    return logits[..., first : max(first, last), :].diagonal(offset + first, -2, -1)


def _operands(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    # V, U and s in the accumulation dtype.
    image, keys = loss.image_features, loss.keys
    if isinstance(keys, Factors):
        coefficients, basis = _first_factors(keys, accumulation_dtype(image.dtype))
        keys = coefficients @ basis
    return _raised(image, keys, loss.logit_scale)


def _raised(image: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Logits and sums are float32, or float64 for float64 features.
    dtype = accumulation_dtype(image.dtype)
    return image.to(dtype), keys.to(dtype), scale.to(dtype)


def _nll(logits: Tensor, positives: Tensor) -> Tensor:
    # log(1 + sum_{j != i} exp(S_ij - S_ii)) of each row [*, N]
    eye = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    negatives = (logits - positives.unsqueeze(-1)).masked_fill(eye, -torch.inf)
    return torch.logaddexp(torch.logsumexp(negatives, -1), torch.zeros_like(positives))


def _grad_logits(logits: Tensor, positives: Tensor, nll: Tensor, label_smoothing: float) -> Tensor:
    # N dL/dS of one direction: P - (1 - eps) I - eps / N, with P_ii - 1 = expm1(-nll_i)
    grad = torch.exp(logits - positives.unsqueeze(-1) - nll.unsqueeze(-1))
    grad.diagonal(dim1=-2, dim2=-1).copy_(torch.expm1(-nll) + label_smoothing)
    return grad - label_smoothing / logits.shape[-1]


def _first_factors(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Zeros both from the rank on, since uninitialised memory there may be NaN, and 0 * NaN is NaN.
    # The gradients there are products with these zeros, so they are zero too.
    coefficients, basis, rank = factors
    used = torch.arange(coefficients.shape[-1], device=rank.device) < rank.unsqueeze(-1)  # [*, K]
    return (
        torch.where(used.unsqueeze(-2), coefficients, 0.0).to(dtype),
        torch.where(used.unsqueeze(-1), basis, 0.0).to(dtype),
    )
