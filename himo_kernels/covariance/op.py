"""Backends, schemas and autograd of covariance and gram."""

from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton, extension
from himo_kernels.covariance import cpu, reference
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward

_TRITON = "himo_kernels.covariance.triton"

COVARIANCE = Operator(
    "covariance",
    {
        "triton": _triton.backend(_TRITON, "covariance", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "covariance", extension.why_not_for, cpu.suits_covariance),
        "reference": Backend.of(reference, "covariance"),
    },
)
GRAM = Operator(
    "gram",
    {
        "triton": _triton.backend(_TRITON, "gram", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "gram", extension.why_not_for, cpu.suits_gram),
        "reference": Backend.of(reference, "gram"),
    },
)

_FWD = {operator.name: operator.define("fwd") for operator in (COVARIANCE, GRAM)}
_BWD = {operator.name: operator.define("bwd") for operator in (COVARIANCE, GRAM)}


class CentredMoment(torch.autograd.Function):
    """covariance or gram. Saves x and its mean; the backward recomputes X instead of saving it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [*, N, D]
        operator: str,
        dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        mean, moment = _FWD[operator](x, dtype, backend)
        ctx.save_for_backward(x, mean)
        ctx.operator, ctx.backend = operator, backend
        return mean, moment

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_moment: Tensor) -> Any:
        refuse_double_backward(ctx.operator)
        x, mean = ctx.saved_tensors
        return _BWD[ctx.operator](grad_mean, grad_moment, x, mean, ctx.backend), None, None, None
