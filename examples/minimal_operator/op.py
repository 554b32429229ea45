"""Backends, schemas and autograd of relu. Imports no Triton."""

from torch import Tensor

from examples.minimal_operator import cpu, reference
from himo_kernels import _triton, extension
from himo_kernels.dispatch import Backend, Operator, apply_function, saves_inputs

_BACKENDS = {  # "auto" tries them in this order; Triton runs only when named
    "triton": _triton.backend(f"{__package__}.triton", "relu", _triton.why_not),
    "cpu": Backend.of(cpu, "relu", extension.why_not_for),
    "reference": Backend.of(reference, "relu"),
}
RELU = Operator("relu", _BACKENDS, public=False)  # so that tests of all operators skip it
Relu = saves_inputs("relu", RELU.define("fwd"), RELU.define("bwd"))


def relu(x: Tensor, *, backend: str = "auto") -> Tensor:  # [*, N, D] -> [*, N, D]
    return apply_function(Relu, x, RELU.resolve(backend, x))
