"""The specification of info_nce_pairs: plain PyTorch, any float dtype, with N x M masks.

As in ../reference.py, exponentials are relative to a positive. Where there is a single positive its
exponential is exactly 1, so that the log of a confident one keeps all its digits.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels.info_nce.pairs.compose import Problem, Softmax


def statistics(problem: Problem) -> tuple[Tensor, ...]:
    """Returns log and T of the rows [*, N], and of the columns [*, M] if they have losses."""
    logits = problem.logit_scale.to(_dtype(problem)) * _products(problem)  # [*, N, M]
    positive, allowed = _masks(problem)
    of_rows = _statistics(logits, positive, allowed, problem.rows)
    if problem.columns is None:
        return of_rows
    return *of_rows, *_statistics(logits.mT, positive.mT, allowed.mT, problem.columns)


def gradients(problem: Problem, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Returns the gradients of query, key and logit_scale, ignoring needs."""
    scale, products = problem.logit_scale.to(_dtype(problem)), _products(problem)
    logits = scale * products
    positive, allowed = _masks(problem)
    smoothing = problem.label_smoothing
    grad = _grad_logits(logits, positive, allowed, problem.rows, smoothing)
    if problem.columns is not None:
        transposed = (logits.mT, positive.mT, allowed.mT)
        grad = grad + _grad_logits(*transposed, problem.columns, smoothing).mT
    return (
        scale * grad @ problem.key.to(scale.dtype),
        scale * grad.mT @ problem.query.to(scale.dtype),
        (grad * products).sum(),
    )


def _dtype(problem: Problem) -> torch.dtype:
    return accumulation_dtype(problem.query.dtype)


def _products(problem: Problem) -> Tensor:
    dtype = _dtype(problem)
    return problem.query.to(dtype) @ problem.key.to(dtype).mT


def _masks(problem: Problem) -> tuple[Tensor, Tensor]:
    # Which pairs are positive, and which are positive or negative: [*, N, M] each.
    positive = problem.row_keys.unsqueeze(-1) == problem.column_keys.unsqueeze(-2)
    allowed = torch.ones_like(positive)
    if problem.row_labels is not None and problem.column_labels is not None:
        same = problem.row_labels.unsqueeze(-1) == problem.column_labels.unsqueeze(-2)
        allowed = positive | ~same
    if problem.exclude_self:
        rows, columns = positive.shape[-2:]
        other = ~torch.eye(rows, columns, dtype=torch.bool, device=positive.device)
        positive, allowed = positive & other, allowed & other
    return positive, allowed


def _single(softmax: Softmax, others: int) -> Tensor:
    # [*, n, m]: the single positive of each row.
    places = torch.arange(others, device=softmax.single.device)
    return softmax.single.unsqueeze(-1) == places


def _targets(softmax: Softmax, positive: Tensor, allowed: Tensor) -> Tensor:
    # The target distribution [*, n, m]: 1 - eps over the positives, eps over all that is allowed.
    target, share = softmax.target.unsqueeze(-1), softmax.share.unsqueeze(-1)
    return target * positive + share * allowed


def _statistics(
    logits: Tensor, positive: Tensor, allowed: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    relative = logits - softmax.reference.unsqueeze(-1)
    others = allowed & ~_single(softmax, logits.shape[-1])
    log = torch.logsumexp(relative.masked_fill(~others, -torch.inf), -1)
    log = torch.where(softmax.single >= 0, torch.logaddexp(log, torch.zeros_like(log)), log)
    log = log.masked_fill(~allowed.any(-1), 0.0)
    targets = _targets(softmax, positive, allowed)
    return log, (targets * relative).masked_fill(~others, 0.0).sum(-1)


def _grad_logits(
    logits: Tensor, positive: Tensor, allowed: Tensor, softmax: Softmax, smoothing: float
) -> Tensor:
    log, weight = cast(Tensor, softmax.log), cast(Tensor, softmax.weight)  # set for the backward
    log, reference, share, weight = (
        value.unsqueeze(-1) for value in (log, softmax.reference, softmax.share, weight)
    )
    grad = torch.exp(logits - reference - log) - _targets(softmax, positive, allowed)
    of_single = torch.expm1(-log) + smoothing - share  # = P - target - share, without cancellation
    grad = torch.where(_single(softmax, logits.shape[-1]), of_single, grad)
    return weight * grad.masked_fill(~allowed, 0.0)
