"""pytorch-metric-learning's NTXentLoss and SupConLoss, without lists of pairs.

compute_loss is replaced: reducers, regularisers and records stay theirs. e are the embeddings, r
the references (e itself without ref_emb), l their labels, S = e @ r.T / temperature.

    NTXentLoss    a loss for each positive pair (a, p), l_a = l_p: minus the log-softmax of S_ap
                  among p and the columns of other labels
    SupConLoss    a loss for each row a: minus the mean, over its positives p, of the log-softmax of
                  S_ap among all columns; 0 without a positive

Without ref_emb, no row is a pair with itself. The library itself computes a call with an
indices_tuple, the pairs of a miner or of a CrossBatchMemory: they may be any of N x M pairs, and
are listed anyway. It also refuses a call without labels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from himo_kernels.dispatch import check_backend
from himo_kernels.info_nce import info_nce
from himo_kernels.integrations.kinds import (
    Kind,
    as_under_autocast,
    base_named,
    check_settings,
    raise_setting,
)

PACKAGE = "pytorch_metric_learning"
SETTINGS = ("temperature", "distance", "reducer")  # since version 1.0


# Takes rows [N, D], columns [M, D], their matches, one over the temperature and the backend.
# Returns losses, the pair or row of each, and what reducers call these.
Losses = Callable[[Tensor, Tensor, "Matches", float, str], tuple[Tensor, Any, str]]


def nt_xent(
    rows: Tensor, columns: Tensor, matches: "Matches", scale: float, backend: str
) -> tuple[Tensor, Any, str]:
    """Returns the losses of NTXentLoss, one of each positive pair."""
    anchors, positives = matches.pairs()
    losses = info_nce(
        rows[anchors],
        columns,
        scale,
        directions="rows",
        positives=positives,
        labels=(matches.rows[anchors], matches.columns),
        same_label="exclude",
        reduction="none",
        backend=backend,
    )
    return losses, (anchors, positives), "pos_pair"


def sup_con(
    rows: Tensor, columns: Tensor, matches: "Matches", scale: float, backend: str
) -> tuple[Tensor, Any, str]:
    """Returns the losses of SupConLoss, one of each row."""
    losses = info_nce(
        rows,
        columns,
        scale,
        directions="rows",
        labels=(matches.rows, matches.columns),
        exclude_self=matches.exclude_self,
        reduction="none",
        backend=backend,
    )
    return losses, torch.arange(len(rows), device=rows.device), "element"


def compute_loss_of(
    loss: Any, losses_of: Losses, *, backend: str = "auto"
) -> Callable[..., dict[str, Any]]:
    """Returns the new compute_loss."""
    check_backend("accelerate", backend)
    check_settings(type(loss).__name__, loss, SETTINGS)
    _check_distance("accelerate", loss.distance)

    def compute_loss(
        self: Any,
        embeddings: Tensor,  # [N, D]
        labels: Tensor | None,  # [N]
        indices_tuple: Any,
        ref_emb: Tensor,  # [M, D]
        ref_labels: Tensor,  # [M]
    ) -> dict[str, Any]:
        if indices_tuple is not None or labels is None:
            arguments = (embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return type(self).compute_loss(self, *arguments)
        rows, columns = _features(self, embeddings, ref_emb)
        matches = Matches(labels, ref_labels)
        if matches.too_few():
            return self.zero_losses()
        losses, indices, of_what = losses_of(rows, columns, matches, 1 / self.temperature, backend)
        losses = losses.to(embeddings.dtype)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": of_what}}

    return compute_loss


KINDS = tuple(
    Kind(
        f"pytorch-metric-learning's {name}",
        partial(base_named, name=name, package=PACKAGE),
        ("compute_loss", "_compute_loss", computed_by),
        partial(compute_loss_of, losses_of=losses_of),
        ("backend",),
        "compute_loss",
    )
    for name, computed_by, losses_of in (
        ("NTXentLoss", "pair_based_loss", nt_xent),
        ("SupConLoss", "mat_based_loss", sup_con),
    )
)


class Matches:
    """The pairs of equal labels, without an N x M mask."""

    def __init__(self, labels: Tensor, ref_labels: Tensor) -> None:
        # As in get_matches_and_diffs: one object for both means no reference but the rows.
        self.exclude_self = ref_labels is labels
        both = torch.cat([labels, ref_labels.to(labels.device)])
        numbers = torch.unique(both, return_inverse=True)[1]  # labels of any dtype as int64
        self.rows, self.columns = numbers[: len(labels)], numbers[len(labels) :]
        values, self._order = self.columns.sort(stable=True)
        self._begin = torch.searchsorted(values, self.rows)
        self._count = torch.searchsorted(values, self.rows, right=True) - self._begin

    def too_few(self) -> bool:
        """Whether the library returns zero: no positive pair, no negative pair, or one of each."""
        equal = int(self._count.sum())  # reads the device, as does the library
        positive = equal - self.exclude_self * min(len(self.rows), len(self.columns))
        negative = len(self.rows) * len(self.columns) - equal
        return min(positive, negative) == 0 or max(positive, negative) <= 1

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Returns row and column of the positive pairs, [P] each, in the order of torch.where."""
        rows = torch.arange(len(self.rows), device=self.rows.device)
        anchors = rows.repeat_interleave(self._count)
        first = self._count.cumsum(0) - self._count  # place of each row's first pair
        place = torch.arange(len(anchors), device=rows.device) - first[anchors]
        positives = self._order[self._begin[anchors] + place]
        if self.exclude_self:
            other = anchors != positives
            anchors, positives = anchors[other], positives[other]
        return anchors, positives


def _check_distance(operator: str, distance: Any) -> None:
    known, found = base_named(distance, "DotProductSimilarity", PACKAGE), type(distance)
    names = ("forward", "compute_mat")
    if known is None or any(getattr(found, name) is not getattr(known, name) for name in names):
        expected = "CosineSimilarity or DotProductSimilarity"
        raise_setting(operator, "distance", expected, found.__name__)
    if distance.power != 1:
        raise_setting(operator, "distance.power", "1", distance.power)


def _features(loss: Any, embeddings: Tensor, ref_emb: Tensor) -> tuple[Tensor, ...]:
    """Returns rows [N, D] and columns [M, D] whose products are the similarities."""
    distance = loss.distance
    _check_distance(type(loss).__name__, distance)
    distance.reset_stats()
    rows, columns = distance.maybe_normalize(embeddings), distance.maybe_normalize(ref_emb)
    distance.set_default_stats(embeddings, ref_emb, rows, columns)
    return as_under_autocast(rows, columns)
