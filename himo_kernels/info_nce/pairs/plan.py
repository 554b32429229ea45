"""Which pairs are positive, negative or excluded, as a few integers for each row and column.

No N x M mask is formed: a backend decides about the pair (i, j) in its tile, by two comparisons. It
is positive if the keys of row i and column j are equal. Otherwise it is excluded if their labels
are equal. With exclude_self the pair (i, i) is excluded, whatever its keys and labels are.

Shapes are known without reading a value, and the host never waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """What decides about the pairs of the rows, or of the columns: n of them, m others."""

    keys: Tensor  # [*, n] int32
    labels: Tensor | None  # [*, n] int32; None on both sides: labels exclude nothing
    anchor: Tensor  # [*, n] int64: a positive of each; any of the others where it has none
    positives: Tensor  # [*, n] int64: how many it has
    allowed: Tensor  # [*, n] int64: how many of the others are not excluded


def of_positives(
    positives: Tensor,  # [*, N]
    labels: tuple[Tensor, Tensor] | None,  # [*, N], [*, M]
    columns: int,
    exclude_self: bool,
) -> tuple[Side, Side]:
    """Returns rows and columns where each row has one positive, or none outside of [0, M).

    Other pairs of equal labels are excluded.
    """
    *batch, rows = positives.shape
    positives = positives.long()
    inside = (positives >= 0) & (positives < columns)
    anchor = positives.clamp(0, columns - 1)
    keys = torch.arange(columns, dtype=torch.int32, device=positives.device)
    keys = keys.expand(*batch, columns)
    counted = inside
    if exclude_self:
        counted = inside & (positives != torch.arange(rows, device=positives.device))
    count = counted.long()
    column_count = count.new_zeros(keys.shape).scatter_add_(-1, anchor, count)
    # The first row whose positive the column is.
    first = torch.where(counted, torch.arange(rows, device=positives.device), rows - 1)
    column_anchor = torch.full_like(column_count, rows - 1)
    column_anchor.scatter_reduce_(-1, anchor, first, "amin")
    allowed = _allowed(count, columns, rows, exclude_self)
    column_allowed = _allowed(column_count, rows, columns, exclude_self)
    own: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if labels is not None:
        row_labels, column_labels = own = _ranks(*labels)
        # Pairs of equal labels are excluded, unless they are positive.
        positive = (counted & (column_labels.gather(-1, anchor) == row_labels)).long()
        allowed += positive - _matches(row_labels, column_labels, exclude_self)[0]
        column_allowed -= _matches(column_labels, row_labels, exclude_self)[0]
        column_allowed.scatter_add_(-1, anchor, positive)
    row_keys = torch.where(inside, positives, -1).to(torch.int32)
    return (
        Side(row_keys, own[0], anchor, count, allowed),
        Side(keys, own[1], column_anchor, column_count, column_allowed),
    )


def of_labels(
    labels: tuple[Tensor, Tensor],  # [*, N], [*, M]
    exclude_self: bool,
) -> tuple[Side, Side]:
    """Returns rows and columns where the pairs of equal labels are positive."""
    row_keys, column_keys = _ranks(*labels)

    def side(own: Tensor, others: Tensor) -> Side:
        count, anchor = _matches(own, others, exclude_self)
        allowed = _allowed(count, others.shape[-1], own.shape[-1], exclude_self)
        return Side(own, None, anchor, count, allowed)

    return side(row_keys, column_keys), side(column_keys, row_keys)


def _allowed(like: Tensor, others: int, own: int, exclude_self: bool) -> Tensor:
    # All others, except each one itself.
    allowed = torch.full_like(like, others)
    if exclude_self:
        allowed[..., : min(own, others)] -= 1
    return allowed


def _ranks(row_labels: Tensor, column_labels: Tensor) -> tuple[Tensor, Tensor]:
    # Labels as int32: the place among the sorted labels of the columns; -1 for a row without one.
    row_labels, column_labels = row_labels.long().contiguous(), column_labels.long().contiguous()
    values = torch.sort(column_labels).values
    places = torch.searchsorted(values, row_labels).clamp_(max=values.shape[-1] - 1)
    found = values.gather(-1, places) == row_labels
    columns = torch.searchsorted(values, column_labels)
    return torch.where(found, places, -1).to(torch.int32), columns.to(torch.int32)


def _matches(own: Tensor, others: Tensor, exclude_self: bool) -> tuple[Tensor, Tensor]:
    # For each of own [*, n], how many of others [*, m] are equal to it, and the first of them. With
    # exclude_self, number i of own does not match number i of others.
    values, order = torch.sort(others, stable=True)
    last = others.shape[-1] - 1
    begin = torch.searchsorted(values, own)
    count = torch.searchsorted(values, own, right=True) - begin
    first = order.gather(-1, begin.clamp(max=last))
    if exclude_self:
        both = min(own.shape[-1], last + 1)
        count[..., :both] -= (own[..., :both] == others[..., :both]).long()
        second = order.gather(-1, (begin + 1).clamp(max=last))
        itself = first == torch.arange(own.shape[-1], device=own.device)
        first = torch.where(itself, second, first)
    return count, first
