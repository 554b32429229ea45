"""Schemas, fakes and autograd of covariance and gram."""

from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.covariance import cpu, reference
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward

_TRITON = "himo_kernels.covariance.triton"

COVARIANCE = Operator(
    "covariance",
    {
        "triton": _triton.backend(_TRITON, "covariance", _triton.why_not_with_float64),
        "cpu": Backend(
            {"fwd": cpu.covariance_fwd, "bwd": cpu.covariance_bwd},
            cpu.why_not,
            cpu.suits_covariance,
        ),
        "reference": Backend({"fwd": reference.covariance_fwd, "bwd": reference.covariance_bwd}),
    },
)
GRAM = Operator(
    "gram",
    {
        "triton": _triton.backend(_TRITON, "gram", _triton.why_not_with_float64),
        "cpu": Backend({"fwd": cpu.gram_fwd, "bwd": cpu.gram_bwd}, cpu.why_not, cpu.suits_gram),
        "reference": Backend({"fwd": reference.gram_fwd, "bwd": reference.gram_bwd}),
    },
)


def _covariance_fake(x: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    *batch, _, features = x.shape
    return (
        x.new_empty((*batch, features), dtype=dtype),
        x.new_empty((*batch, features, features), dtype=dtype),
    )


def _gram_fake(x: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    *batch, samples, features = x.shape
    return (
        x.new_empty((*batch, features), dtype=dtype),
        x.new_empty((*batch, samples, samples), dtype=dtype),
    )


def _bwd_fake(
    grad_mean: Tensor, grad_moment: Tensor, x: Tensor, mean: Tensor, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


_FWD_SCHEMA = "(Tensor x, ScalarType dtype, str backend) -> (Tensor, Tensor)"
_BWD_SCHEMA = "(Tensor grad_mean, Tensor grad_moment, Tensor x, Tensor mean, str backend) -> Tensor"
_FWD = {
    "covariance": COVARIANCE.define("fwd", _FWD_SCHEMA, _covariance_fake),
    "gram": GRAM.define("fwd", _FWD_SCHEMA, _gram_fake),
}
_BWD = {
    "covariance": COVARIANCE.define("bwd", _BWD_SCHEMA, _bwd_fake),
    "gram": GRAM.define("bwd", _BWD_SCHEMA, _bwd_fake),
}


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
