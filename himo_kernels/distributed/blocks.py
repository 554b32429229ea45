"""One block of the logits, rows of this rank against some keys: its statistics and its gradients.

What a kernel would replace. S = s V K^T, a few rows at a time, so that no more than the given
number of logits exist at once. As in info_nce/reference.py every probability is formed relative to
a positive: rows to S_ii of theirs, columns to S_jj of theirs, whose owner is another rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from himo_kernels._dispatch import full_float32


def block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [n, D]
    scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [n]
    offset: int,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Returns statistics of the rows [M, 2] and of the columns [n, 2].

    Each is log sum exp(S_ij - positive) without the positive itself, and the sum of all S_ij.

    Args:
        offset: row i and column i + offset are a pair, where there is such a column.
        budget: logits that may exist at once.
    """
    dtype = scale.dtype
    columns = torch.stack([scale.new_full((len(keys),), -torch.inf), scale.new_zeros(len(keys))], 1)
    rows = scale.new_empty(len(image_features), 2)
    with full_float32(keys.device.type):
        keys = keys.to(dtype)
        for part in _parts(len(image_features), len(keys), budget):
            logits = scale * (image_features[part].to(dtype) @ keys.mT)
            rows[part, 1], totals = logits.sum(1), logits.sum(0)
            _diagonal(logits, part.start + offset).fill_(-torch.inf)
            rows[part, 0] = torch.logsumexp(logits - row_positives[part, None], 1)
            columns[:, 0] = torch.logaddexp(
                columns[:, 0], torch.logsumexp(logits - column_positives, 0)
            )
            columns[:, 1] += totals
    return rows, columns


def block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [n, D]
    scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    row_nll: Tensor,  # [M]
    row_weight: Tensor,  # [M], gradient of each row's nll
    column_positives: Tensor,  # [n]
    column_nll: Tensor,  # [n]
    column_weight: Tensor,  # [n]
    offset: int,
    budget: int,
    smoothing: float,
    total: int,
    differentiate_keys: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [n, D], without the factor s.

    Args:
        smoothing: label smoothing eps.
        total: N, of which eps is spread over.
        differentiate_keys: False gives images the gradient of the rows alone, and keys that of
            the columns alone: what is a key in the other direction is a constant there.
    """
    dtype = scale.dtype
    grad_images = scale.new_empty(image_features.shape)
    grad_keys = scale.new_zeros(keys.shape)
    with full_float32(keys.device.type):
        keys = keys.to(dtype)
        for part in _parts(len(image_features), len(keys), budget):
            images = image_features[part].to(dtype)
            logits = scale * (images @ keys.mT)
            diagonal = _diagonal(logits, part.start + offset)
            first = max(0, part.start + offset)  # of the columns that have their pair here
            pairs = slice(first - offset, first - offset + len(diagonal))
            # dL/dS of the rows: P - (1 - eps) I - eps / N, with P_ii - 1 = expm1(-nll_i).
            grad_rows = (logits - row_positives[part, None]).sub_(row_nll[part, None]).exp_()
            _diagonal(grad_rows, part.start + offset).copy_(
                torch.expm1(-row_nll[pairs]) + smoothing
            )
            grad_rows = (grad_rows - smoothing / total) * row_weight[part, None]
            grad_columns = logits.sub_(column_positives).sub_(column_nll).exp_()
            diagonal.copy_(torch.expm1(-column_nll[first : first + len(diagonal)]) + smoothing)
            grad_columns.sub_(smoothing / total).mul_(column_weight)
            if differentiate_keys:
                grad_rows = grad_columns = grad_rows + grad_columns
            grad_images[part] = grad_rows @ keys
            grad_keys += grad_columns.mT @ images
    return grad_images, grad_keys


def _parts(rows: int, columns: int, budget: int) -> Iterator[slice]:
    step = max(1, budget // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _diagonal(logits: Tensor, offset: int) -> Tensor:
    # The entries (i, i + offset) that lie in logits, as a view; none of them where none do.
    rows, columns = logits.shape
    first, last = max(0, -offset), min(rows, columns - offset)
    return logits[first : max(first, last)].diagonal(offset + first)
