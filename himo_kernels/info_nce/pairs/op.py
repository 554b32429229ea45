"""Schema, fakes and autograd of info_nce_pairs."""

from typing import Any, cast

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, empty_gradients, refuse_double_backward
from himo_kernels.info_nce.op import CACHING_BACKENDS
from himo_kernels.info_nce.pairs import compose, cpu, reference
from himo_kernels.info_nce.pairs.compose import Settings
from himo_kernels.memory import cache_for

_TRITON = "himo_kernels.info_nce.triton.pairs"

INFO_NCE_PAIRS = Operator(
    "info_nce_pairs",
    {
        "triton": _triton.backend(_TRITON, "info_nce_pairs", _triton.why_not),
        "cpu": Backend(
            compose.passes(cpu.statistics, cpu.gradients, cpu.row_products), extension.why_not_for
        ),
        "reference": Backend(compose.passes(reference.statistics, reference.gradients)),
    },
)

_INPUTS = (
    "Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? positives, "
    "Tensor? row_labels, Tensor? column_labels, "
)
_SETTINGS = "bool exclude_self, bool of_rows, bool of_columns, float label_smoothing, "


def _fwd_fake(
    image_features: Tensor, text_features: Tensor, *arguments: Any, products: Tensor | None = None
) -> tuple[Tensor, ...]:
    of_rows, of_columns = arguments[5:7]
    dtype = accumulation_dtype(image_features.dtype)
    *batch, samples, _ = image_features.shape
    shapes = [
        (*batch, samples if of_rows else 0),
        (*batch, text_features.shape[-2] if of_columns else 0),
    ]
    dtypes = [dtype] * 6 + [torch.int64] * 2
    return tuple(
        image_features.new_empty(shape, dtype=of_output)
        for shape, of_output in zip(shapes * 4, dtypes, strict=True)
    )


def _bwd_fake(
    grad_row_losses: Tensor,
    grad_column_losses: Tensor,
    *arguments: Any,
    products: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return empty_gradients(arguments[:3], arguments[-2])


# Losses, logs, references and numbers of positives, each of rows [*, N] and of columns [*, M];
# [*, 0] for a direction that is not wanted.
# products: logits before scaling [*, N, M], or [*, M, N] of columns alone. Backends that cache them
# write them in the forward and read them in the backward.
_FWD = INFO_NCE_PAIRS.define(
    "fwd",
    f"({_INPUTS}{_SETTINGS}str backend, *, Tensor(a!)? products=None) -> "
    f"({', '.join(['Tensor'] * 8)})",
    _fwd_fake,
)
_BWD = INFO_NCE_PAIRS.define(
    "bwd",
    f"(Tensor grad_row_losses, Tensor grad_column_losses, {_INPUTS}Tensor row_logs, "
    f"Tensor column_logs, Tensor row_references, Tensor column_references, {_SETTINGS}"
    "bool[] needs_grad, str backend, *, Tensor? products=None) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)


class PairLosses(torch.autograd.Function):
    """The loss of each row and of each column, and how many positives each has.

    Saves the inputs, and the logs and references of both softmaxes. Also saves the logits before
    scaling, if the backend can cache them and all calls of a loss together fit logits_budget bytes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        settings: Settings,
        backend: str,
        logits_budget: float | None,
        calls: int,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        image_features, text_features = cast(tuple[Tensor, Tensor], inputs[:2])
        products = None
        if backend in CACHING_BACKENDS and any(ctx.needs_input_grad):
            *batch, samples, _ = image_features.shape
            table = (samples, text_features.shape[-2])
            shape = (*batch, *(table if settings.of_rows else table[::-1]))
            products = cache_for(image_features, shape, logits_budget, count=calls)
        outputs = _FWD(*inputs, *settings, backend, products=products)
        losses, saved, counts = outputs[:2], outputs[2:6], outputs[6:]
        cached = [] if products is None else [products]
        ctx.save_for_backward(*inputs, *saved, *cached)
        ctx.cached = len(cached)
        ctx.settings, ctx.backend = settings, backend
        ctx.mark_non_differentiable(*counts)
        return *losses, *counts

    @staticmethod
    def backward(ctx: Any, grad_row_losses: Tensor, grad_column_losses: Tensor, *_: None) -> Any:
        refuse_double_backward("info_nce_pairs")
        settings = 4  # arguments of forward before the inputs
        needs_grad = ctx.needs_input_grad[settings : settings + 3]
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks it only once
        grads = _BWD(
            grad_row_losses,
            grad_column_losses,
            *saved[: len(saved) - ctx.cached],
            *ctx.settings,
            list(needs_grad),
            ctx.backend,
            products=saved[-1] if ctx.cached else None,
        )
        of_inputs = [grad if need else None for grad, need in zip(grads, needs_grad, strict=True)]
        return *(None,) * settings, *of_inputs, None, None, None
