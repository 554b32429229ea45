"""Schemas, fakes and autograd of info_nce, dual_info_nce and dual_info_nce_low_rank."""

from typing import Any

import torch
from torch import Tensor

from himo_kernels._dispatch import (
    Backend,
    Operator,
    accumulation_dtype,
    refuse_double_backward,
)
from himo_kernels.info_nce import cpu, reference

INFO_NCE = Operator(
    "info_nce",
    {
        "cpu": Backend({"fwd": cpu.info_nce_fwd, "bwd": cpu.info_nce_bwd}, cpu.why_not),
        "reference": Backend({"fwd": reference.info_nce_fwd, "bwd": reference.info_nce_bwd}),
    },
)
DUAL_INFO_NCE = Operator(
    "dual_info_nce",
    {
        "cpu": Backend({"fwd": cpu.dual_info_nce_fwd, "bwd": cpu.dual_info_nce_bwd}, cpu.why_not),
        "reference": Backend(
            {"fwd": reference.dual_info_nce_fwd, "bwd": reference.dual_info_nce_bwd}
        ),
    },
)
DUAL_INFO_NCE_LOW_RANK = Operator(
    "dual_info_nce_low_rank",
    {
        "cpu": Backend(
            {"fwd": cpu.dual_info_nce_low_rank_fwd, "bwd": cpu.dual_info_nce_low_rank_bwd},
            cpu.why_not,
        ),
        "reference": Backend(
            {
                "fwd": reference.dual_info_nce_low_rank_fwd,
                "bwd": reference.dual_info_nce_low_rank_bwd,
            }
        ),
    },
)

# The inputs of each operator, in order. rank alone is not differentiable.
_INPUTS = {
    "info_nce": ("image_features", "text_features", "logit_scale"),
    "dual_info_nce": ("image_features", "text_features", "component_features", "logit_scale"),
    "dual_info_nce_low_rank": (
        "image_features",
        "text_features",
        "coefficients",
        "basis",
        "rank",
        "logit_scale",
    ),
}


def _define(operator: Operator) -> tuple[Any, Any]:
    # Forward: (loss, row_nll, column_nll), once or, in the dual forms, twice.
    # Backward: (grad of each loss, inputs, nlls, ...) -> one gradient for each input but rank.
    inputs = _INPUTS[operator.name]
    losses = 1 if operator is INFO_NCE else 2
    differentiable = [index for index, name in enumerate(inputs) if name != "rank"]

    def fwd_fake(image_features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *batch, samples, _ = image_features.shape
        dtype = accumulation_dtype(image_features.dtype)
        loss_and_nlls = (batch, (*batch, samples), (*batch, samples))
        return tuple(
            image_features.new_empty(shape, dtype=dtype) for shape in loss_and_nlls * losses
        )

    def bwd_fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors = arguments[losses : losses + len(inputs)]
        needs_grad = arguments[-2]
        return tuple(
            tensors[index].new_empty(tensors[index].shape if needed else 0)
            for index, needed in zip(differentiable, needs_grad, strict=True)
        )

    def arguments(*names: str) -> str:
        return "".join(f"Tensor {name}, " for name in names)

    grads = ("grad_global_loss", "grad_component_loss")[:losses]
    nlls = ("row_nll", "column_nll", "component_row_nll", "component_column_nll")[: 2 * losses]
    fwd_schema = (
        f"({arguments(*inputs)}float label_smoothing, str backend) -> "
        f"({', '.join(['Tensor'] * 3 * losses)})"
    )
    bwd_schema = (
        f"({arguments(*grads, *inputs, *nlls)}float label_smoothing, bool differentiate_keys, "
        f"bool[] needs_grad, str backend) -> ({', '.join(['Tensor'] * len(differentiable))})"
    )
    return (
        operator.define("fwd", fwd_schema, fwd_fake),
        operator.define("bwd", bwd_schema, bwd_fake),
    )


_KERNELS = {
    operator.name: _define(operator)
    for operator in (INFO_NCE, DUAL_INFO_NCE, DUAL_INFO_NCE_LOW_RANK)
}


class ContrastiveLoss(torch.autograd.Function):
    """The losses of an operator named above. Saves its inputs and nlls [*, N], never logits."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        label_smoothing: float,
        differentiate_keys: bool,
        backend: str,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        fwd, _ = _KERNELS[operator]
        outputs = fwd(*inputs, label_smoothing, backend)
        nlls = [output for index, output in enumerate(outputs) if index % 3]
        ctx.save_for_backward(*inputs, *nlls)
        ctx.operator, ctx.label_smoothing, ctx.backend = operator, label_smoothing, backend
        ctx.differentiate_keys = differentiate_keys
        return tuple(outputs[::3])

    @staticmethod
    def backward(ctx: Any, *grad_losses: Tensor) -> Any:
        refuse_double_backward(ctx.operator)
        _, bwd = _KERNELS[ctx.operator]
        names = _INPUTS[ctx.operator]
        settings = 4  # arguments of forward before the inputs
        needs_grad = dict(zip(names, ctx.needs_input_grad[settings:], strict=True))
        needs_grad.pop("rank", None)
        computed = bwd(
            *grad_losses,
            *ctx.saved_tensors,
            ctx.label_smoothing,
            ctx.differentiate_keys,
            list(needs_grad.values()),
            ctx.backend,
        )
        grads = dict(zip(needs_grad, computed, strict=True))
        return *(None,) * settings, *(
            grads[name] if needs_grad.get(name) else None for name in names
        )
