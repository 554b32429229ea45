"""InfoNCE with labels over ranks: each rank's rows against the gathered rows of all ranks.

Labels decide about every pair of the joined batch, so a rank's rows are the rows of the operator of
one process, against all columns. README.md has the share and its cost.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from himo_kernels._numerics import accumulation_dtype
from himo_kernels.distributed.gather import AllGather
from himo_kernels.distributed.wire import Rows
from himo_kernels.info_nce.pairs.form import Form, loss_of_pairs

if TYPE_CHECKING:
    from himo_kernels.distributed.loss import Options


def labelled_losses(
    rows: Rows,
    options: "Options",
    image_features: Tensor,  # [M, D]
    keys: tuple[Tensor, ...],  # texts, or texts and components, [M, D] each
    logit_scale: Tensor,  # []
    labels: Tensor,  # [N] int64, of all ranks
) -> tuple[Tensor, ...]:
    """Shares of the losses. One gather, and one reduce-scatter of the gradients of its rows."""
    of_rows, of_columns = (options.directions in ("both", name) for name in ("rows", "columns"))
    sent = torch.cat([*(keys if of_rows else ()), *([image_features] if of_columns else [])], 1)
    if options.differentiate_keys:
        received = AllGather.apply(sent, rows)
    else:
        received = rows.all_gather(sent.detach())
    parts = received.split(image_features.shape[1], 1)
    own = slice(rows.first(rows.rank), rows.first(rows.rank) + rows.own)
    exclude = options.same_label == "exclude"
    places = torch.arange(rows.total, device=labels.device)[own]
    form = Form(
        directions="rows",
        positives=places if exclude else None,
        row_labels=labels[own],
        column_labels=labels,
        exclude_self=False,
        reduction="sum",
        row_weights=None,
        column_weights=None,
    )
    # Every row has a positive, its own column: a mean is over all N, and DDP's is over W ranks.
    weight = rows.members.size / rows.total

    def share(queries: Tensor, columns: Tensor) -> Tensor:
        if rows.own == 0:  # zero, with gradients of zero: every rank takes part in the backward
            dtype = accumulation_dtype(columns.dtype)
            return logit_scale.to(dtype) * (queries.sum(dtype=dtype) + columns[:0].sum(dtype=dtype))
        return weight * loss_of_pairs(
            form,
            queries,
            columns,
            logit_scale,
            float(options.label_smoothing),
            True,  # columns are constants already where they have to be
            0.0,  # recompute the logits: memory is O(N D)
            options.backend,
        )

    shares = []
    for index, key in enumerate(keys):
        found = []
        if of_rows:
            found.append(share(image_features, parts[index]))
        if of_columns:
            found.append(share(key, parts[-1]))
        shares.append(sum(found[1:], found[0]) / len(found))
    return tuple(shares)
