"""Schema, fakes and autograd of normalize."""

from typing import Any

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward
from himo_kernels.normalize import cpu, reference

_TRITON = "himo_kernels.normalize.triton"

NORMALIZE = Operator(
    "normalize",
    {
        "triton": _triton.backend(_TRITON, "normalize", _triton.why_not_with_float64),
        "cpu": Backend({"fwd": cpu.normalize_fwd, "bwd": cpu.normalize_bwd}, cpu.why_not),
        "reference": Backend({"fwd": reference.normalize_fwd, "bwd": reference.normalize_bwd}),
    },
)


def _fwd_fake(features: Tensor, backend: str) -> Tensor:
    return features.new_empty(features.shape)


def _bwd_fake(grad: Tensor, features: Tensor, backend: str) -> Tensor:
    return features.new_empty(features.shape)


_FWD_SCHEMA = "(Tensor features, str backend) -> Tensor"
_BWD_SCHEMA = "(Tensor grad, Tensor features, str backend) -> Tensor"
_FWD = NORMALIZE.define("fwd", _FWD_SCHEMA, _fwd_fake, multiplies=False)
_BWD = NORMALIZE.define("bwd", _BWD_SCHEMA, _bwd_fake, multiplies=False)


class Normalize(torch.autograd.Function):
    """normalize. Saves only the features, from which the backward recomputes the rest.

    The output would not do, because bfloat16 rounds it, nor the length, which may overflow the
    dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # [*, N, D]
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(features)
        ctx.backend = backend
        return _FWD(features, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # [*, N, D]
        refuse_double_backward("normalize")
        (features,) = ctx.saved_tensors
        return _BWD(grad, features, ctx.backend), None
