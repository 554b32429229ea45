"""Schemas, fakes and autograd of info_nce, dual_info_nce and dual_info_nce_low_rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels._numerics import accumulation_dtype
from himo_kernels.dispatch import Backend, Operator, empty_gradients, refuse_double_backward
from himo_kernels.info_nce import compose, cpu, reference
from himo_kernels.memory import cache_for

_TRITON = "himo_kernels.info_nce.triton"


def _operator(name: str, plain: Callable[..., Any] | None = None) -> Operator:
    return Operator(
        name,
        {
            "triton": _triton.backend(_TRITON, name, _triton.why_not),
            "cpu": Backend(
                compose.passes(name, cpu.fwd, cpu.bwd), extension.why_not_for, plain=plain
            ),
            "reference": Backend(compose.passes(name, reference.fwd, reference.bwd)),
        },
    )


INFO_NCE = _operator("info_nce", cpu.plain)
DUAL_INFO_NCE = _operator("dual_info_nce", cpu.plain)
DUAL_INFO_NCE_LOW_RANK = _operator("dual_info_nce_low_rank")


def _define(operator: Operator) -> tuple[Any, Any]:
    # Forward: returns (loss, row_nll, column_nll), twice in the dual forms.
    # Backward: (grad of each loss, inputs, nlls, ...) -> one gradient for each input except rank.
    # products [losses, *, N, N]: logits before scaling. Backends that cache them write them in the
    # forward and read them in the backward.
    inputs = compose.input_names(operator.name)
    losses = len(compose.LOSSES[operator.name])
    differentiable = [index for index, name in enumerate(inputs) if name != "rank"]

    def fwd_fake(
        image_features: Tensor, *arguments: Any, products: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        *batch, samples, _ = image_features.shape
        dtype = accumulation_dtype(image_features.dtype)
        loss_and_nlls = (batch, (*batch, samples), (*batch, samples))
        return tuple(
            image_features.new_empty(shape, dtype=dtype) for shape in loss_and_nlls * losses
        )

    def bwd_fake(*arguments: Any, products: Tensor | None = None) -> tuple[Tensor, ...]:
        tensors = arguments[losses : losses + len(inputs)]
        return empty_gradients((tensors[index] for index in differentiable), arguments[-2])

    def arguments(*names: str) -> str:
        return "".join(f"Tensor {name}, " for name in names)

    grads = ("grad_global_loss", "grad_component_loss")[:losses]
    nlls = ("row_nll", "column_nll", "component_row_nll", "component_column_nll")[: 2 * losses]
    fwd_schema = (
        f"({arguments(*inputs)}float label_smoothing, str backend, *, "
        f"Tensor(a!)? products=None) -> ({', '.join(['Tensor'] * 3 * losses)})"
    )
    bwd_schema = (
        f"({arguments(*grads, *inputs, *nlls)}float label_smoothing, bool differentiate_keys, "
        f"bool[] needs_grad, str backend, *, Tensor? products=None) -> "
        f"({', '.join(['Tensor'] * len(differentiable))})"
    )
    return (
        operator.define("fwd", fwd_schema, fwd_fake),
        operator.define("bwd", bwd_schema, bwd_fake),
    )


_KERNELS = {
    operator.name: _define(operator)
    for operator in (INFO_NCE, DUAL_INFO_NCE, DUAL_INFO_NCE_LOW_RANK)
}


# Backends that can cache the logits for the backward.
CACHING_BACKENDS = ("cpu",)


def _allocate_products(
    operator: str, image_features: Tensor, budget: float | None
) -> Tensor | None:
    *batch, samples, _ = image_features.shape
    shape = (len(compose.LOSSES[operator]), *batch, samples, samples)
    return cache_for(image_features, shape, budget)


class ContrastiveLoss(torch.autograd.Function):
    """The losses of one of the operators above. Saves the inputs and nlls [*, N].

    Also saves the logits before scaling, if the backend can cache them and they fit logits_budget
    bytes. A plain call on a CPU has the same in C++ (csrc/info_nce_plain.cpp).
    """

    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        label_smoothing: float,
        differentiate_keys: bool,
        backend: str,
        logits_budget: float | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        fwd, _ = _KERNELS[operator]
        products = None
        if backend in CACHING_BACKENDS and any(ctx.needs_input_grad):
            products = _allocate_products(operator, inputs[0], logits_budget)
        outputs = fwd(*inputs, label_smoothing, backend, products=products)
        nlls = [output for index, output in enumerate(outputs) if index % 3]
        cached = [] if products is None else [products]
        ctx.save_for_backward(*inputs, *nlls, *cached)
        ctx.cached = len(cached)
        ctx.operator, ctx.label_smoothing, ctx.backend = operator, label_smoothing, backend
        ctx.differentiate_keys = differentiate_keys
        return tuple(outputs[::3])

    @staticmethod
    def backward(ctx: Any, *grad_losses: Tensor) -> Any:
        refuse_double_backward(ctx.operator)
        _, bwd = _KERNELS[ctx.operator]
        names = compose.input_names(ctx.operator)
        settings = 5  # arguments of forward before the inputs
        needs_grad = dict(zip(names, ctx.needs_input_grad[settings:], strict=True))
        needs_grad.pop("rank", None)
        saved = ctx.saved_tensors
        computed = bwd(
            *grad_losses,
            *saved[: len(saved) - ctx.cached],
            ctx.label_smoothing,
            ctx.differentiate_keys,
            list(needs_grad.values()),
            ctx.backend,
            products=saved[-1] if ctx.cached else None,
        )
        grads = dict(zip(needs_grad, computed, strict=True))
        return *(None,) * settings, *(
            grads[name] if needs_grad.get(name) else None for name in names
        )
