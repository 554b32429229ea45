"""A block of the logits of a larger batch: what one process computes of a loss over several.

Rows [M, D] of images against keys [N, D], of which row i and column i + offset are a pair where
there is such a column. Positives are S of each row's and each column's own pair, wherever that is:
probabilities are formed relative to them, as in reference.py. No autograd, no schema: the loss over
ranks (himo_kernels/distributed/loss.py) has its own.
"""

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.dispatch import Backend, Operator
from himo_kernels.info_nce import cpu, reference

_TRITON = "himo_kernels.info_nce.triton"

BLOCK = Operator(
    "info_nce_block",
    {
        "triton": _triton.backend(_TRITON, "info_nce_block", _triton.why_not),
        "cpu": Backend({"fwd": cpu.info_nce_block_fwd, "bwd": cpu.info_nce_block_bwd}, cpu.why_not),
        "reference": Backend(
            {"fwd": reference.info_nce_block_fwd, "bwd": reference.info_nce_block_bwd}
        ),
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
    """Returns log sum exp(S_ij - positive) of the rows [M] and of the columns [N], without pairs.

    Positives and results are float32, float64 for float64 features.
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
    row_positives: Tensor,  # [M]
    row_nll: Tensor,  # [M], of the whole batch, as all of these
    row_weight: Tensor,  # [M], gradient of each nll
    column_positives: Tensor,  # [N]
    column_nll: Tensor,  # [N]
    column_weight: Tensor,  # [N]
    offset: int,
    label_smoothing: float,
    total: int,
    differentiate_keys: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of image_features [M, D] and keys [N, D], without the factor s.

    Args:
        label_smoothing: eps, spread over the `total` samples of the batch.
        differentiate_keys: False gives images the gradient of the rows alone, and keys that of
            the columns alone: what is a key in the other direction is a constant there.
    """
    if len(image_features) == 0 or len(keys) == 0:
        dtype = row_nll.dtype
        return torch.zeros_like(image_features, dtype=dtype), torch.zeros_like(keys, dtype=dtype)
    return BLOCK.run(
        "bwd",
        image_features,
        keys,
        logit_scale,
        row_positives,
        row_nll,
        row_weight,
        column_positives,
        column_nll,
        column_weight,
        offset,
        label_smoothing,
        total,
        differentiate_keys,
        backend,
    )
