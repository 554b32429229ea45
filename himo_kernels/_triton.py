"""Whether Triton kernels can run, on which tensors, and their deferred import.

`import himo_kernels` does not import Triton: a module with kernels is imported at the first call.
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
# variable that may change. Triton accepts the same spellings.
INTERPRETED = os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")

# The architecture that himo_kernels.aot compiles for: what `capability` returns for a meta tensor.
aot_target: int | None = None


def _find() -> str | None:
    # Only located: an import takes 0.2 s. A broken installation fails at the first call.
    try:
        missing = importlib.util.find_spec("triton") is None
    except (ImportError, ValueError) as error:
        return f"Triton cannot be found ({error})"
    return "Triton is not installed; install it with: pip install triton" if missing else None


MISSING = _find()  # why Triton cannot be used at all, or None


def why_not(features: Tensor, *_: Tensor) -> str | None:
    """Returns why Triton kernels cannot take these features, or None. torch.compile traces it."""
    if MISSING is None and features.dtype == torch.float64:
        return "needs float16, bfloat16 or float32, got float64"
    return why_not_with_float64(features)


def why_not_with_float64(features: Tensor, *_: Tensor) -> str | None:
    """Like why_not, for kernels that also take float64."""
    if MISSING is not None:
        return MISSING
    if features.device.type == "cpu" and not INTERPRETED:
        return f"needs CUDA tensors, got cpu; {INTERPRETER_VARIABLE}=1 interprets the kernels there"
    if features.device.type not in ("cpu", "cuda"):
        return f"needs CUDA tensors, got {features.device.type}"
    return None


def _deferred(module: str, function: str) -> Callable[..., object]:
    """Returns module.function, imported at its first call and run on its tensors' device.

    For the tables of op.py, which must not import Triton. Triton launches on the current device,
    not on the device of the tensors.
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

    auto=False means that the kernels are not yet run on hardware.
    """
    kernels = {part: _deferred(module, f"{operator}_{part}") for part in parts}
    return Backend(kernels, why_not, auto, gate=None if auto else NOT_RUN)


def float64_bits(value: float) -> int:
    """Returns the bits of value for _triton_jit.float64_of; Triton passes a float as float32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def capability(x: Tensor) -> int:
    """Returns the compute capability behind x, 10 major + minor; 0 in the interpreter.

    It is the key of the tables of tile configurations. For a meta tensor it is the target of
    himo_kernels.aot.
    """
    if x.is_meta and aot_target is not None:
        return aot_target
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
