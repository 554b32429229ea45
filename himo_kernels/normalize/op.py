"""Backends, schemas and autograd of normalize.

The backward needs only the features. The output would not do, because bfloat16 rounds it, nor the
length, which may overflow the dtype.
"""

from himo_kernels import _triton, extension
from himo_kernels.dispatch import Backend, Operator, saves_inputs
from himo_kernels.normalize import cpu, reference

_TRITON = "himo_kernels.normalize.triton"

NORMALIZE = Operator(
    "normalize",
    {
        "triton": _triton.backend(_TRITON, "normalize", _triton.why_not_with_float64),
        "cpu": Backend.of(cpu, "normalize", extension.why_not_for),
        "reference": Backend.of(reference, "normalize"),
    },
)
Normalize = saves_inputs(
    NORMALIZE.name,
    NORMALIZE.define("fwd", multiplies=False),
    NORMALIZE.define("bwd", multiplies=False),
)
