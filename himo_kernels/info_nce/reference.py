"""The specification of info_nce, its dual forms and its blocks: plain PyTorch, any float dtype.

S = s V U^T [*, N, N]. Every probability is formed relative to the positive, S_ij - S_ii, and what
is kept of a row is nll_i = -log P_ii = log(1 + sum_{j != i} exp(S_ij - S_ii)). A confident
positive (P_ii = 0.999 at s = 100) keeps all its digits that way; log-sum-exp minus S_ii, two
numbers near 100, leaves two or three of them in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Logits of a block that exist at once, as long as its features are not larger: 16 MiB in float32.
_BLOCK_LOGITS = 1 << 22


def info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss [*], and nll of the rows and of the columns of S, [*, N] each."""
    image, text, scale = _raise(image_features, text_features, logit_scale)
    logits = scale * (image @ text.mT)  # [*, N, N]
    positives = logits.diagonal(dim1=-2, dim2=-1)  # [*, N]
    row_nll = _nll(logits, positives)
    column_nll = _nll(logits.mT, positives)
    # HiMo-CLIP eq. (2); both directions share the smoothing term, the mean of all logits.
    smoothing = label_smoothing * (positives.mean(-1) - logits.mean((-2, -1)))
    return (row_nll + column_nll).mean(-1) / 2 + smoothing, row_nll, column_nll


def info_nce_bwd(
    grad_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of image_features, text_features and logit_scale; empty if unneeded."""
    image, text, scale = _raise(image_features, text_features, logit_scale)
    products = image @ text.mT
    logits = scale * products
    positives = logits.diagonal(dim1=-2, dim2=-1)
    weight = (grad_loss / (2 * logits.shape[-1]))[..., None, None]
    grad_rows = weight * _grad_logits(logits, positives, row_nll, label_smoothing)
    grad_columns = weight * _grad_logits(logits.mT, positives, column_nll, label_smoothing).mT
    grad_logits = grad_rows + grad_columns
    grad_images = scale * (grad_logits if differentiate_keys else grad_rows) @ text
    grad_texts = scale * (grad_logits if differentiate_keys else grad_columns).mT @ image
    grad_scale = (grad_logits * products).sum()
    grads = (
        grad_images.to(image_features.dtype),
        grad_texts.to(text_features.dtype),
        grad_scale.to(logit_scale.dtype),
    )
    return tuple(  # type: ignore[return-value]
        grad if needed else grad.new_empty(0)
        for grad, needed in zip(grads, needs_grad, strict=True)
    )


def dual_info_nce_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (loss, row nll, column nll) of the texts, then of the components: eq. (2), (3)."""
    return (
        *info_nce_fwd(image_features, text_features, logit_scale, label_smoothing),
        *info_nce_fwd(image_features, component_features, logit_scale, label_smoothing),
    )


def dual_info_nce_bwd(
    grad_global_loss: Tensor,  # [*]
    grad_component_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    component_features: Tensor,  # [*, N, D]
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    component_row_nll: Tensor,  # [*, N]
    component_column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of images, texts, components and logit_scale; empty if unneeded."""
    needs_image, needs_text, needs_component, needs_scale = needs_grad
    image, text, scale = _raise(image_features, text_features, logit_scale)
    grad_image, grad_text, grad_scale = info_nce_bwd(
        grad_global_loss,
        image,
        text,
        scale,
        row_nll,
        column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_text, needs_scale],
    )
    grad_component_image, grad_component, grad_component_scale = info_nce_bwd(
        grad_component_loss,
        image,
        component_features.to(image.dtype),
        scale,
        component_row_nll,
        component_column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_component, needs_scale],
    )
    return (
        (grad_image + grad_component_image).to(image_features.dtype),  # one rounding for the sum
        grad_text.to(text_features.dtype),
        grad_component.to(component_features.dtype),
        (grad_scale + grad_component_scale).to(logit_scale.dtype),
    )


def dual_info_nce_low_rank_fwd(
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
    logit_scale: Tensor,  # []
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what dual_info_nce_fwd does of component_features = coefficients @ basis."""
    image, text, scale = _raise(image_features, text_features, logit_scale)
    kept_coefficients, kept_basis = _first_factors(coefficients, basis, rank, image.dtype)
    component = kept_coefficients @ kept_basis
    return dual_info_nce_fwd(image, text, component, scale, label_smoothing)


def dual_info_nce_low_rank_bwd(
    grad_global_loss: Tensor,  # [*]
    grad_component_loss: Tensor,  # [*]
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, N, D]
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*] int64
    logit_scale: Tensor,  # []
    row_nll: Tensor,  # [*, N]
    column_nll: Tensor,  # [*, N]
    component_row_nll: Tensor,  # [*, N]
    component_column_nll: Tensor,  # [*, N]
    label_smoothing: float,
    differentiate_keys: bool,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of images, texts, coefficients, basis and logit_scale."""
    needs_image, needs_text, needs_coefficients, needs_basis, needs_scale = needs_grad
    image, text, scale = _raise(image_features, text_features, logit_scale)
    kept_coefficients, kept_basis = _first_factors(coefficients, basis, rank, image.dtype)
    grad_image, grad_text, grad_component, grad_scale = dual_info_nce_bwd(
        grad_global_loss,
        grad_component_loss,
        image,
        text,
        kept_coefficients @ kept_basis,
        scale,
        row_nll,
        column_nll,
        component_row_nll,
        component_column_nll,
        label_smoothing,
        differentiate_keys,
        [needs_image, needs_text, needs_coefficients or needs_basis, needs_scale],
    )
    grad_coefficients = coefficients.new_empty(0)
    if needs_coefficients:
        grad_coefficients = grad_component @ kept_basis.mT
    grad_basis = basis.new_empty(0)
    if needs_basis:
        grad_basis = kept_coefficients.mT @ grad_component
    return (
        grad_image.to(image_features.dtype),
        grad_text.to(text_features.dtype),
        grad_coefficients.to(coefficients.dtype),
        grad_basis.to(basis.dtype),
        grad_scale.to(logit_scale.dtype),
    )


def info_nce_block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    offset: int,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) of the rows [M] and of the columns [N], without pairs.

    Row i and column i + offset are a pair, where there is such a column.
    """
    images, keys, scale = _raise(image_features, keys, logit_scale)
    rows = torch.empty_like(row_positives)
    columns = torch.full_like(column_positives, -torch.inf)
    for part in _parts(images, keys):
        logits = scale * (images[part] @ keys.mT)
        _pairs(logits, part.start + offset).fill_(-torch.inf)
        rows[part] = torch.logsumexp(logits - row_positives[part, None], 1)
        columns = torch.logaddexp(columns, torch.logsumexp(logits - column_positives, 0))
    return rows, columns


def info_nce_block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
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
    images, keys, scale = _raise(image_features, keys, logit_scale)
    grad_images, grad_keys = torch.empty_like(images), torch.zeros_like(keys)
    share = label_smoothing / total
    for part in _parts(images, keys):
        logits = scale * (images[part] @ keys.mT)
        pairs = _pairs(logits, part.start + offset)
        first = max(0, part.start + offset)  # of the columns that have their pair here
        columns = slice(first, first + len(pairs))
        rows = slice(first - offset, first - offset + len(pairs))
        # dL/dS of the rows: P - (1 - eps) I - eps / N, with P_ii - 1 = expm1(-nll_i).
        grad_rows = (logits - row_positives[part, None]).sub_(row_nll[part, None]).exp_()
        _pairs(grad_rows, part.start + offset).copy_(torch.expm1(-row_nll[rows]) + label_smoothing)
        grad_rows.sub_(share).mul_(row_weight[part, None])
        grad_columns = logits.sub_(column_positives).sub_(column_nll).exp_()
        pairs.copy_(torch.expm1(-column_nll[columns]) + label_smoothing)
        grad_columns.sub_(share).mul_(column_weight)
        if differentiate_keys:
            grad_rows = grad_columns = grad_rows + grad_columns
        grad_images[part] = grad_rows @ keys
        grad_keys += grad_columns.mT @ images[part]
    return grad_images, grad_keys


def _parts(images: Tensor, keys: Tensor) -> Iterator[slice]:
    # Of the rows, so many that their logits are within bounds.
    step = max(1, max(_BLOCK_LOGITS, images.numel()) // len(keys))
    for start in range(0, len(images), step):
        yield slice(start, min(start + step, len(images)))


def _pairs(logits: Tensor, offset: int) -> Tensor:
    # The entries (i, i + offset) that lie in logits, as a view; none of them where none do.
    rows, columns = logits.shape
    first, last = max(0, -offset), min(rows, columns - offset)
    return logits[first : max(first, last)].diagonal(offset + first)


def _raise(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Logits and all sums in float32, in float64 for float64 features.
    dtype = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    return image_features.to(dtype), text_features.to(dtype), logit_scale.to(dtype)


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


def _first_factors(
    coefficients: Tensor,  # [*, N, K]
    basis: Tensor,  # [*, K, D]
    rank: Tensor,  # [*]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # Both with zeros at and past the rank: 0 * NaN of memory that nobody filled would be NaN. The
    # gradients there, products with these zeros, are zero as well.
    kept = torch.arange(coefficients.shape[-1], device=rank.device) < rank.unsqueeze(-1)  # [*, K]
    return (
        torch.where(kept.unsqueeze(-2), coefficients, 0.0).to(dtype),
        torch.where(kept.unsqueeze(-1), basis, 0.0).to(dtype),
    )
