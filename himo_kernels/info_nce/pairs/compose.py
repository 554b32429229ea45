"""Builds the operator info_nce_pairs from the two passes that a backend implements.

A backend gets a Problem: it knows which pairs are positive and the coefficients of each row and
column, and nothing of reductions. README.md (9) to (12) has the formulas.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from himo_kernels._checks import check_places
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.info_nce.pairs import plan


class Softmax(NamedTuple):
    """The losses of the rows, or of the columns: n own, m others. In the dtype of the logits."""

    single: Tensor  # [*, n] int32: the only positive; -1 where there is none or several
    reference: Tensor  # r [*, n]: S of a positive, made by the forward
    target: Tensor  # [*, n]: (1 - eps) / number of positives; 0 where there is none
    share: Tensor  # [*, n]: eps / number of others that are not excluded
    # Backward only.
    log: Tensor | None = None  # [*, n]: as Statistics returned it
    weight: Tensor | None = None  # [*, n]: gradient of each loss; 0 where there is no positive


class Problem(NamedTuple):
    """Logits S = s X Y^T, and what plan.py says about their pairs.

    The rows have losses. The columns may have none.
    """

    query: Tensor  # X [*, N, D]
    key: Tensor  # Y [*, M, D]
    logit_scale: Tensor  # s []
    row_keys: Tensor  # [*, N] int32
    column_keys: Tensor  # [*, M] int32
    row_labels: Tensor | None  # [*, N] int32
    column_labels: Tensor | None  # [*, M] int32
    exclude_self: bool
    label_smoothing: float
    rows: Softmax
    columns: Softmax | None
    products: Tensor | None = None  # X Y^T [*, N, M]: cache, written by fwd, read by bwd


class Statistics(Protocol):
    """Returns log and T of the rows [*, N], then of the columns [*, M] if they have losses.

    log = log sum exp(S - r) over the others that are not excluded. A single positive counts as
    exp(0), in the form log(1 + ...). log is 0 where all others are excluded.
    T = sum (target [positive] + share) (S - r) over the same others, without a single positive.
    """

    def __call__(self, problem: Problem) -> tuple[Tensor, ...]: ...


class Gradients(Protocol):
    """Returns the gradients of query, key and logit_scale in any dtype, None if not needed.

    dL/dS is the sum over rows and columns of weight (P - target [positive] - share), with
    P = exp(S - r - log), and 0 for excluded pairs. P - target - share of a single positive is
    expm1(-log) + label_smoothing - share.
    """

    def __call__(self, problem: Problem, needs: Sequence[bool]) -> tuple[Tensor | None, ...]: ...


class RowProducts(Protocol):
    """Returns own_i . others_k with k = places_i [*, n], in the dtype of the logits."""

    def __call__(
        self,
        own: Tensor,  # [*, n, D]
        others: Tensor,  # [*, m, D]
        places: Tensor,  # [*, n] int64
    ) -> Tensor: ...


class Inputs(NamedTuple):
    """The arguments that both passes of the schema share, in its order."""

    image_features: Tensor  # [*, N, D]
    text_features: Tensor  # [*, M, D]
    logit_scale: Tensor  # []
    positives: Tensor | None  # [*, N] integers
    row_labels: Tensor | None  # [*, N] integers
    column_labels: Tensor | None  # [*, M] integers


class Settings(NamedTuple):
    """The arguments of the schema that are not tensors."""

    exclude_self: bool
    of_rows: bool
    of_columns: bool
    label_smoothing: float


def gathered_products(own: Tensor, others: Tensor, places: Tensor) -> Tensor:
    """Implements RowProducts in plain PyTorch, with a copy of the rows of others."""
    dtype = accumulation_dtype(own.dtype)
    index = places.unsqueeze(-1).expand(*places.shape, own.shape[-1])
    return (own.to(dtype) * others.gather(-2, index).to(dtype)).sum(-1)


def passes(
    statistics: Statistics, gradients: Gradients, row_products: RowProducts = gathered_products
) -> dict[str, Callable[..., Any]]:
    """Returns the `fwd` and `bwd` of the operator, with its schema's arguments."""
    return {"fwd": partial(_fwd, statistics, row_products), "bwd": partial(_bwd, gradients)}


def _fwd(
    statistics: Statistics,
    row_products: RowProducts,
    *arguments: Any,
    products: Tensor | None = None,
) -> tuple[Tensor, ...]:
    # Returns losses [*, N] and [*, M], then logs, references and numbers of positives of the same
    # shapes; [*, 0] in a direction that is not wanted.
    count = len(Inputs._fields)
    inputs, settings = Inputs(*arguments[:count]), Settings(*arguments[count:])
    if inputs.positives is not None and inputs.positives.device.type == "cpu":  # no sync there
        check_places("info_nce", "positives", inputs.positives, inputs.text_features.shape[-2])
    sides = _sides(inputs, settings)
    features = (inputs.image_features, inputs.text_features)
    wanted = (settings.of_rows, settings.of_columns)
    scale = inputs.logit_scale.to(accumulation_dtype(inputs.image_features.dtype))
    saved = tuple(
        (scale * row_products(own, others, side.anchor),) if of_direction else ()
        for side, of_direction, own, others in zip(
            sides, wanted, features, features[::-1], strict=True
        )
    )
    problem = _problem(inputs, settings, sides, products, saved)
    computed = list(statistics(problem))
    softmaxes = [problem.rows, problem.columns]
    empty = computed[0].new_empty(*inputs.image_features.shape[:-2], 0)
    losses, logs, references, counts = [], [], [], []
    for side, of_direction in zip(sides, wanted, strict=True):
        if not of_direction:
            losses.append(empty)
            logs.append(empty.clone())
            references.append(empty.clone())
            counts.append(side.positives[..., :0])
            continue
        log, total = computed.pop(0), computed.pop(0)
        softmax = cast(Softmax, softmaxes.pop(0))  # there is one of each direction that is wanted
        # A single positive is not among log and total, so a bad one would not show: 0 or NaN.
        bad = softmax.reference - softmax.reference
        losses.append(torch.where(side.positives > 0, log - total + bad, 0.0))
        logs.append(log)
        references.append(softmax.reference)
        counts.append(side.positives)
    return *losses, *logs, *references, *counts


def _bwd(
    gradients: Gradients, *arguments: Any, products: Tensor | None = None
) -> tuple[Tensor, ...]:
    # Returns the gradients of the features and of logit_scale, in their dtypes; empty if not
    # needed.
    *tensors, needs_grad = arguments
    weights, tensors = tensors[:2], tensors[2:]
    count = len(Inputs._fields)
    inputs, tensors = Inputs(*tensors[:count]), tensors[count:]
    logs, references, settings = tensors[:2], tensors[2:4], Settings(*tensors[4:])
    sides = _sides(inputs, settings)
    saved = tuple(zip(references, logs, weights, strict=True))
    problem = _problem(inputs, settings, sides, products, saved)
    if settings.of_rows:
        computed = gradients(problem, needs_grad)
    else:
        key, query, scale = gradients(problem, [needs_grad[1], needs_grad[0], needs_grad[2]])
        computed = (query, key, scale)
    differentiable = (inputs.image_features, inputs.text_features, inputs.logit_scale)
    return tuple(
        value.new_empty(0) if grad is None or not needed else grad.to(value.dtype)
        for value, grad, needed in zip(differentiable, computed, needs_grad, strict=True)
    )


def _sides(inputs: Inputs, settings: Settings) -> tuple[plan.Side, plan.Side]:
    labels = None
    if inputs.row_labels is not None and inputs.column_labels is not None:
        labels = (inputs.row_labels, inputs.column_labels)
    if inputs.positives is not None:
        columns = inputs.text_features.shape[-2]
        return plan.of_positives(inputs.positives, labels, columns, settings.exclude_self)
    if labels is None:
        raise RuntimeError("info_nce_pairs: expected positives or labels, got neither")
    return plan.of_labels(labels, settings.exclude_self)


def _problem(
    inputs: Inputs,
    settings: Settings,
    sides: tuple[plan.Side, plan.Side],
    products: Tensor | None,
    saved: tuple[tuple[Tensor, ...], ...],
) -> Problem:
    # The problem that a backend computes. If only the columns have losses, they are its rows. saved
    # has the reference of rows and of columns, for the backward also their log and weight.
    features = (inputs.image_features, inputs.text_features)
    wanted = (settings.of_rows, settings.of_columns)
    softmaxes = [
        _softmax(side, settings.label_smoothing, *of_side) if of_direction else None
        for side, of_direction, of_side in zip(sides, wanted, saved, strict=True)
    ]
    order = 1 if settings.of_rows else -1
    (query, key), (rows, columns) = features[::order], sides[::order]
    of_rows, of_columns = softmaxes[::order]
    return Problem(
        query,
        key,
        inputs.logit_scale,
        rows.keys,
        columns.keys,
        rows.labels,
        columns.labels,
        settings.exclude_self,
        settings.label_smoothing,
        cast(Softmax, of_rows),  # the API asks for one direction at least
        of_columns,
        products,
    )


def _softmax(
    side: plan.Side,
    smoothing: float,
    reference: Tensor,  # [*, n]
    log: Tensor | None = None,  # [*, n]
    weight: Tensor | None = None,  # [*, n]
) -> Softmax:
    none, dtype = side.positives == 0, reference.dtype
    return Softmax(
        torch.where(side.positives == 1, side.anchor, -1).to(torch.int32),
        reference,
        torch.where(none, 0.0, (1 - smoothing) / side.positives.to(dtype)),
        smoothing / side.allowed.clamp(min=1).to(dtype),
        log,
        None if weight is None else weight.masked_fill(none, 0.0),
    )
