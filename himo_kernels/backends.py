"""What an operator is registered with: its backends and where each can run.

Public, so that an operator may live outside of this package. CONTRIBUTING.md has the steps, and
examples/minimal_operator is a complete operator.
"""

from himo_kernels._triton import backend as triton_backend
from himo_kernels._triton import why_not as why_not_triton
from himo_kernels._triton import why_not_with_float64 as why_not_triton_with_float64
from himo_kernels.dispatch import Backend, Operator, apply_function, saves_inputs
from himo_kernels.extension import why_not_for as why_not_cpu

__all__ = [
    "Backend",
    "Operator",
    "apply_function",
    "saves_inputs",
    "triton_backend",
    "why_not_cpu",
    "why_not_triton",
    "why_not_triton_with_float64",
]
