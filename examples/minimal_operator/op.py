"""Table, schemas, fakes and autograd of scale_rows. Imports no Triton."""

import torch
from torch import Tensor

from examples.minimal_operator import cpu, reference
from himo_kernels import _triton
from himo_kernels.dispatch import Backend, Operator, refuse_double_backward

SCALE_ROWS = Operator(
    "scale_rows",
    {  # "auto" tries them in this order; Triton runs only when named until hardware has run it
        "triton": _triton.backend(f"{__package__}.triton", "scale_rows", _triton.why_not),
        "cpu": Backend({"fwd": cpu.scale_rows_fwd, "bwd": cpu.scale_rows_bwd}, cpu.why_not),
        "reference": Backend({"fwd": reference.scale_rows_fwd, "bwd": reference.scale_rows_bwd}),
    },
)
_FWD = SCALE_ROWS.define(
    "fwd", "(Tensor x, Tensor scale, str backend) -> Tensor", lambda x, *_: x.new_empty(x.shape)
)
_BWD = SCALE_ROWS.define(
    "bwd",
    "(Tensor grad, Tensor x, Tensor scale, str backend) -> (Tensor, Tensor)",
    lambda grad, x, scale, _: (x.new_empty(x.shape), scale.new_empty(scale.shape)),
)


class ScaleRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.backend = backend
        return _FWD(x, scale, backend)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_double_backward("scale_rows")
        return *_BWD(grad, *ctx.saved_tensors, ctx.backend), None


def scale_rows(x: Tensor, scale: Tensor, *, backend: str = "auto") -> Tensor:
    """Returns y [N, D]. Operators of the library check their arguments in api.py first."""
    return ScaleRows.apply(x, scale, SCALE_ROWS.resolve(backend, x, scale))
