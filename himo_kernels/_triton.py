"""Triton, where it is installed: whether its kernels can run, on what, and their late import.

`import himo_kernels` imports no Triton: a module with kernels is imported when one is first called.
Without a GPU, TRITON_INTERPRET=1 runs the same kernels in Triton's interpreter, on CPU tensors.
"""

import importlib
import importlib.util
import os
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from himo_kernels.dispatch import NOT_RUN, Backend

INTERPRETER_VARIABLE = "TRITON_INTERPRET"

# Read once: Triton reads it when a kernel is defined, and a compiled graph must not depend on a
# variable that changes under it. The spellings are Triton's.
INTERPRETED = os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")

# The architecture that himo_kernels.aot compiles for: what `capability` tells of a meta tensor.
aot_target: int | None = None


def _find() -> str | None:
    # Found, not imported: importing costs 0.2 s. One that is broken fails at its first call.
    try:
        missing = importlib.util.find_spec("triton") is None
    except (ImportError, ValueError) as error:
        return f"Triton cannot be found ({error})"
    return "Triton is not installed; install it with: pip install triton" if missing else None


MISSING = _find()  # why Triton cannot be used at all, or None


def why_not(features: Tensor, *_: Tensor) -> str | None:
    """Returns why no Triton kernel can take these features, or None. torch.compile traces it."""
    if MISSING is None and features.dtype == torch.float64:
        return "needs float16, bfloat16 or float32, got float64"
    return why_not_with_float64(features)


def why_not_with_float64(features: Tensor, *_: Tensor) -> str | None:
    """Returns the same for kernels that take float64 too."""
    if MISSING is not None:
        return MISSING
    if features.device.type == "cpu" and not INTERPRETED:
        return f"needs CUDA tensors, got cpu; {INTERPRETER_VARIABLE}=1 interprets the kernels there"
    if features.device.type not in ("cpu", "cuda"):
        return f"needs CUDA tensors, got {features.device.type}"
    return None


def _deferred(module: str, function: str) -> Callable[..., object]:
    """Returns module.function, imported at its first call and run on its tensors' device.

    For the tables of op.py, which imports torch alone. Triton launches on the current device,
    whatever device the tensors are on.
    """

    def call(*arguments: object) -> object:
        tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
        with torch.cuda.device_of(tensor):
            return getattr(importlib.import_module(module), function)(*arguments)

    return call


def backend(
    module: str,
    operator: str,
    why_not: Callable[..., str | None],
    *,
    parts: tuple[str, ...] = ("fwd", "bwd"),
    auto: bool = False,
) -> Backend:
    """Returns the backend of an operator whose kernels are module.<operator>_<part>.

    auto=False: the kernels are not yet run on hardware.
    """
    kernels = {part: _deferred(module, f"{operator}_{part}") for part in parts}
    return Backend(kernels, why_not, auto, gate=None if auto else NOT_RUN)


def float64_bits(value: float) -> int:
    """Returns the bits of value, for _triton_jit.float64_of: a kernel's float is a float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def capability(x: Tensor) -> int:
    """Returns the compute capability behind x, 10 major + minor; 0 in the interpreter.

    Tables of tile configurations are keyed by it. Of a meta tensor it is what himo_kernels.aot
    compiles for.
    """
    if x.is_meta and aot_target is not None:
        return aot_target
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
