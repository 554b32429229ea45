"""A block of the logits of a larger batch: the part of a loss over ranks that one rank computes.

Images [M, D] against keys [N, D]; row i and column i + offset are a pair, if there is such a
column. The positives are S of the pair of each row and of each column, on whichever rank it is, and
probabilities are computed relative to them, as in reference.py. There is no autograd and no schema
here: the loss over ranks (himo_kernels/distributed/loss.py) has its own.
"""

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels.dispatch import Backend, Operator
from himo_kernels.info_nce import cpu, reference
from himo_kernels.info_nce.compose import Direction, Settings

_TRITON = "himo_kernels.info_nce.triton"

BLOCK = Operator(
    "info_nce_block",
    {
        "triton": _triton.backend(_TRITON, "info_nce_block", _triton.why_not),
        "cpu": Backend.of(cpu, "info_nce_block", extension.why_not_for),
        "reference": Backend.of(reference, "info_nce_block"),
    },
    public=False,
)


def block_fwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    row_positives: Tensor,  # [M]
    column_positives: Tensor,  # [N]
    offset: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns log sum exp(S_ij - positive) over the negatives of rows [M] and of columns [N].

    Positives and results are float32, or float64 for float64 features.
    """
    if len(image_features) == 0 or len(keys) == 0:
        return (
            torch.full_like(row_positives, -torch.inf),
            torch.full_like(column_positives, -torch.inf),
        )
    inputs = (image_features, keys, logit_scale, row_positives, column_positives, offset)
    return BLOCK.run("fwd", *inputs, backend)


def block_bwd(
    image_features: Tensor,  # [M, D]
    keys: Tensor,  # [N, D]
    logit_scale: Tensor,  # []
    rows: Direction,  # [M] each
    columns: Direction,  # [N] each
    offset: int,
    settings: Settings,
    total: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s.

    Args:
        settings: eps is spread over the `total` samples of the batch. differentiate_keys=False
            gives images only the gradient of the rows and keys only the gradient of the columns,
            because the keys of each direction are constants.
    """
    if len(image_features) == 0 or len(keys) == 0:
        dtype = rows.nll.dtype
        return torch.zeros_like(image_features, dtype=dtype), torch.zeros_like(keys, dtype=dtype)
    inputs = (image_features, keys, logit_scale, rows, columns, offset, settings, total)
    return BLOCK.run("bwd", *inputs, backend)
