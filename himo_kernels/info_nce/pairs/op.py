"""Schema, fakes and autograd of info_nce_pairs."""

from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward
from himo_kernels.info_nce.cpu import why_not
from himo_kernels.info_nce.pairs import compose, cpu, reference
from himo_kernels.info_nce.pairs.compose import Settings

_TRITON = "himo_kernels.info_nce.triton.pairs"

INFO_NCE_PAIRS = Operator(
    "info_nce_pairs",
    {
        "triton": _triton.backend(_TRITON, "info_nce_pairs", _triton.why_not),
        "cpu": Backend(compose.passes(cpu.statistics, cpu.gradients), why_not),
        "reference": Backend(compose.passes(reference.statistics, reference.gradients)),
    },
)

_INPUTS = (
    "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? positives, "
    "Tensor? row_labels, Tensor? column_labels, "
)
_SETTINGS = "bool exclude_self, bool of_rows, bool of_columns, float label_smoothing, "


def _fwd_fake(image_features: Tensor, text_features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    of_rows, of_columns = arguments[5:7]
    dtype = accumulation_dtype(image_features.dtype)
    *batch, samples, _ = image_features.shape
    shapes = [
        (*batch, samples if of_rows else 0),
        (*batch, text_features.shape[-2] if of_columns else 0),
    ]
    dtypes = [dtype] * 4 + [torch.int64] * 2
    return tuple(
        image_features.new_empty(shape, dtype=of_output)
        for shape, of_output in zip(shapes * 3, dtypes, strict=True)
    )


def _bwd_fake(
    grad_row_losses: Tensor, grad_column_losses: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    inputs, needs_grad = arguments[:3], arguments[-2]
    return tuple(
        value.new_empty(value.shape if needed else 0)
        for value, needed in zip(inputs, needs_grad, strict=True)
    )


# Losses, logs and numbers of positives, each of rows [*, N] and of columns [*, M]; [*, 0] for a
# direction that is not wanted.
_FWD = INFO_NCE_PAIRS.define(
    "fwd",
    f"({_INPUTS}{_SETTINGS}str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_BWD = INFO_NCE_PAIRS.define(
    "bwd",
    f"(Tensor grad_row_losses, Tensor grad_column_losses, {_INPUTS}Tensor row_logs, "
    f"Tensor column_logs, {_SETTINGS}bool[] needs_grad, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class PairLosses(torch.autograd.Function):
    """The loss of each row and of each column, and how many positives each has.

    Saves the inputs and the logs of both softmaxes.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, backend: str, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        *losses, row_logs, column_logs, row_counts, column_counts = _FWD(
            *inputs, *settings, backend
        )
        ctx.save_for_backward(*inputs, row_logs, column_logs)
        ctx.settings, ctx.backend = settings, backend
        ctx.mark_non_differentiable(row_counts, column_counts)
        return *losses, row_counts, column_counts

    @staticmethod
    def backward(ctx: Any, grad_row_losses: Tensor, grad_column_losses: Tensor, *_: None) -> Any:
        refuse_double_backward("info_nce_pairs")
        needs_grad = ctx.needs_input_grad[2:5]
        grads = _BWD(
            grad_row_losses,
            grad_column_losses,
            *ctx.saved_tensors,
            *ctx.settings,
            list(needs_grad),
            ctx.backend,
        )
        of_inputs = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
        return None, None, *of_inputs, None, None, None
