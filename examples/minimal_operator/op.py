"""Backends, schemas and autograd of relu. Imports no Triton."""

from torch import Tensor

from examples.minimal_operator import cpu, reference
from himo_kernels import backends
from himo_kernels.backends import Backend, Operator, apply_function, saves_inputs

_BACKENDS = {  # "auto" tries them in this order; Triton runs only when named
    "triton": backends.triton_backend(f"{__package__}.triton", "relu", backends.why_not_triton),
    "cpu": Backend.of(cpu, "relu", backends.why_not_cpu),
    "reference": Backend.of(reference, "relu"),
}
RELU = Operator("relu", _BACKENDS, public=False)  # so that tests of all operators skip it
Relu = saves_inputs("relu", RELU.define("fwd"), RELU.define("bwd"))


def relu(x: Tensor, *, backend: str = "auto") -> Tensor:  # [*, N, D] -> [*, N, D]
    return apply_function(Relu, x, RELU.resolve(backend, x))
