"""The forms of info_nce other than the square one: their arguments, and their reductions."""

from typing import NamedTuple

import torch
from torch import Tensor

from himo_kernels._checks import (
    check_choice,
    check_device,
    check_features,
    check_finite_values,
    check_flag,
    check_integers,
    check_places,
    check_same_as,
    check_shape,
    check_tensor,
    raise_shape,
    raise_type,
    raise_value,
)
from himo_kernels.dispatch import apply_function
from himo_kernels.info_nce.pairs.compose import Inputs, Settings
from himo_kernels.info_nce.pairs.op import INFO_NCE_PAIRS, PairLosses

DIRECTIONS = ("both", "rows", "columns")
SAME_LABEL = ("positive", "exclude")
REDUCTIONS = ("mean", "sum", "none")

# The arguments of the square form, in the order of check_form.
SQUARE = ("both", None, None, "positive", False, "mean", None)

Values = Tensor | tuple[Tensor, Tensor]  # of the rows, or of rows and columns


class Form(NamedTuple):
    """Which pairs count, checked and with the leading dimensions of the features."""

    directions: str
    positives: Tensor | None  # [*, N]; None: labels decide which pairs are positive
    row_labels: Tensor | None  # [*, N]
    column_labels: Tensor | None  # [*, M]
    exclude_self: bool
    reduction: str
    row_weights: Tensor | None  # [*, N]
    column_weights: Tensor | None  # [*, M]


def check_form(
    operator: str,
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, M, D]
    directions: str,
    positives: Tensor | None,  # [N] or [*, N]
    labels: Values | None,
    same_label: str,
    exclude_self: bool,
    reduction: str,
    weights: Values | None,
) -> Form | None:
    """Returns the form of a call of info_nce, None for the square one.

    Raises if its arguments do not fit together.
    """
    check_features(operator, "image_features", image_features)
    check_features(operator, "text_features", text_features, "[*, M, D]")
    check_same_as(operator, "text_features", text_features, "image_features", image_features)
    *batch, samples, width = image_features.shape
    keys = text_features.shape[-2]
    check_shape(operator, "text_features", text_features, (*batch, keys, width))
    check_choice(operator, "directions", directions, DIRECTIONS)
    check_choice(operator, "same_label", same_label, SAME_LABEL)
    check_choice(operator, "reduction", reduction, REDUCTIONS)
    check_flag(operator, "exclude_self", exclude_self)
    no_pairs = positives is None and labels is None and not exclude_self
    if no_pairs and weights is None and (directions, samples) == ("both", keys):
        if reduction != "none":
            return None
    if (directions, reduction) == ("both", "none") and samples != keys:
        expected = "to be 'rows' or 'columns' for losses without a reduction and M != N"
        raise_value(operator, "directions", expected, directions)

    def of_rows_and_columns(
        argument: str, value: object, columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        # Values of the rows, and of the columns if asked for.
        check = check_integers if argument == "labels" else _check_weights
        if isinstance(value, tuple | list):
            if len(value) != 2:
                raise_value(operator, argument, "to be one tensor or two", f"{len(value)} of them")
            names = (f"{argument}[0]", f"{argument}[1]")
            rows, others = value
        else:
            names, (rows, others) = (argument, argument), (value, value)
            if columns and samples != keys:
                expected = f"to be a pair, of {samples} rows and {keys} columns"
                raise_type(operator, argument, expected, type(value).__name__)
        check(operator, names[0], rows, image_features)
        rows = _expanded(operator, names[0], rows, batch, samples)
        if not columns:
            return rows, None
        check(operator, names[1], others, image_features)
        return rows, _expanded(operator, names[1], others, batch, keys)

    if positives is not None:
        check_integers(operator, "positives", positives, image_features)
        positives = _expanded(operator, "positives", positives, batch, samples)
    row_labels, column_labels = None, None
    if labels is not None:
        row_labels, column_labels = of_rows_and_columns("labels", labels, columns=True)
        if same_label == "positive" and positives is not None:
            expected = "to be 'exclude' with positives, which leave labels none to choose"
            raise_value(operator, "same_label", expected, same_label)
    if positives is None and (labels is None or same_label == "exclude"):
        # A plain call with unequal sides is more often a mistake than hard negatives.
        if keys < samples or (directions == "both" and labels is None):
            check_shape(operator, "text_features", text_features, image_features.shape)
        if exclude_self:
            expected = "to be False where each row's positive is its own column"
            raise_value(operator, "exclude_self", expected, exclude_self)
        positives = torch.arange(samples, device=image_features.device).expand(*batch, samples)
    row_weights, column_weights = None, None
    if weights is not None:
        needed = directions != "rows"
        row_weights, column_weights = of_rows_and_columns("weights", weights, columns=needed)
    return Form(
        directions,
        positives,
        row_labels,
        column_labels,
        exclude_self,
        reduction,
        row_weights,
        column_weights,
    )


def check_form_values(operator: str, form: Form, text_features: Tensor) -> None:
    """Raises if a positive is out of range or a weight is not finite. Reads the device."""
    if form.positives is not None:
        check_places(operator, "positives", form.positives, text_features.shape[-2])
    for weights in (form.row_weights, form.column_weights):
        if weights is not None:
            check_finite_values(operator, weights=weights)


def loss_of_pairs(
    form: Form,
    image_features: Tensor,  # [*, N, D]
    text_features: Tensor,  # [*, M, D]
    logit_scale: Tensor,  # []
    label_smoothing: float,
    differentiate_keys: bool,
    logits_budget: float | None,  # bytes; None: the default
    backend: str,
) -> Tensor:
    """Returns the loss [*]; without a reduction [*, N] or, of the columns only, [*, M]."""
    backend = INFO_NCE_PAIRS.resolve(backend, image_features, text_features)
    # With constant keys, both directions are two calls, which keep their logits at the same time.
    calls = 2 if form.directions == "both" and not differentiate_keys else 1

    def reduced(rows: bool, columns: bool) -> list[Tensor]:
        # The reduced loss of each of these directions.
        images, texts = image_features, text_features
        if not differentiate_keys:
            images, texts = (images, texts.detach()) if rows else (images.detach(), texts)
        inputs = Inputs(
            images, texts, logit_scale, form.positives, form.row_labels, form.column_labels
        )
        settings = Settings(form.exclude_self, rows, columns, label_smoothing)
        row_losses, column_losses, *counts = apply_function(
            PairLosses, settings, backend, logits_budget, calls, *inputs
        )
        found = []
        if rows:
            found.append(_reduced(row_losses, counts[0], form.row_weights, form.reduction))
        if columns:
            found.append(_reduced(column_losses, counts[1], form.column_weights, form.reduction))
        return found

    if form.directions != "both":
        return reduced(form.directions == "rows", form.directions == "columns")[0]
    if calls == 1:
        rows, columns = reduced(True, True)
    else:
        rows, columns = *reduced(True, False), *reduced(False, True)
    return (rows + columns) / 2


def _reduced(losses: Tensor, positives: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    # The mean is over the rows (columns) that have a positive; the others have a loss of 0.
    counted = (positives > 0).to(losses.dtype)
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses, counted = weights * losses, weights * counted
    if reduction == "none":
        return losses
    total = losses.sum(-1)
    if reduction == "sum":
        return total
    counted = counted.sum(-1)
    return total / torch.where(counted == 0, 1.0, counted)


def _check_weights(operator: str, argument: str, value: Tensor, other: Tensor) -> None:
    check_tensor(operator, argument, value)
    check_device(operator, argument, value, "the features", other)


def _expanded(operator: str, argument: str, value: Tensor, batch: list[int], size: int) -> Tensor:
    # [size], or [*, size], as [*, size].
    if value.shape not in (torch.Size([size]), torch.Size([*batch, size])):
        expected = f"[{size}]" if not batch else f"[{size}] or {[*batch, size]}"
        raise_shape(operator, argument, expected, value)
    return value.expand(*batch, size)
