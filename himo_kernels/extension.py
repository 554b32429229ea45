"""Loads the compiled extension himo_kernels._C once, or records why it cannot be loaded.

Without it the package lacks only the `cpu` backend. Import raises and prints nothing; the reason is
reported when the backend is requested, and once per process when "auto" has to do without it.
"""

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from himo_kernels._version import __version__

_NAME = "himo_kernels._C"
SWITCH = "HIMO_KERNELS_NO_EXTENSION"
# SOURCES, because a user of an installed package may have no checkout.
BUILD = (
    "with a C++ compiler, build it from the sources of himo-kernels: "
    "pip install --no-build-isolation --no-deps --force-reinstall SOURCES"
)

_SWITCHED_OFF = os.environ.get(SWITCH, "0") not in ("", "0")


def _load() -> tuple[ModuleType | None, str | None, Exception | None]:
    """Returns the module, or None with a one-line reason and the error that caused it."""
    if _SWITCHED_OFF:
        return None, f"the extension is switched off by {SWITCH}={os.environ[SWITCH]}", None
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        return None, f"the extension is not built ({error}); {BUILD}", error
    except Exception as error:  # usually an ImportError: a symbol that this version of torch lacks
        text = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"the extension cannot be loaded by torch {torch.__version__} ({text})"
        needs = "it needs the minor version of torch that it was built for"
        return None, f"{reason}; {needs}; {BUILD}", error
    unfit = _why_unfit(module)
    return (module, None, None) if unfit is None else (None, f"{unfit}; {BUILD}", None)


def _why_unfit(module: ModuleType) -> str | None:
    try:
        info = dict(module.build_info())
        built, running = str(info["torch"]), torch.__version__
    except (AttributeError, TypeError, ValueError, KeyError):
        return f"the extension is not of himo_kernels: it has no build_info ({module.__file__})"
    # The C++ ABI of torch is stable only within a minor version.
    if _minor(built) != _minor(running):
        return f"the extension is built for torch {built}, this is torch {running}"
    if (version := info.get("version", "before 0.2.0")) != __version__:
        return f"the extension is of himo_kernels {version}, this is {__version__}"
    return None


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


_MODULE, _REASON, _ERROR = _load()


def why_not() -> str | None:
    """Returns a one-line reason why the extension cannot be used, or None. Traced by compile."""
    return _REASON


def why_not_for(x: Tensor, *_: Tensor) -> str | None:
    """Returns why a backend in the extension cannot take tensors like x, or None."""
    if x.device.type != "cpu":
        return f"needs CPU tensors, got {x.device.type}"
    return why_not()


_noticed = _MODULE is not None or _SWITCHED_OFF


def notice() -> str | None:
    """Returns why operators on a CPU run in plain PyTorch and how to change it, once per process.

    Returns None afterwards, and if the extension is loaded or switched off.
    """
    global _noticed
    if _noticed:
        return None
    _noticed = True
    return f"operators on a CPU run in plain PyTorch: {_REASON}; {SWITCH}=1 silences this"


def load() -> ModuleType:
    """Returns himo_kernels._C. Raises ImportError, chained to its cause, if it is not loaded."""
    if _MODULE is None:
        raise ImportError(_REASON) from _ERROR
    return _MODULE


def explain(error: AttributeError | TypeError) -> None:
    """Raises ImportError if the extension lacks a function, or the function takes other arguments.

    Only a file built from other sources does: arguments are checked before they come to it.
    """
    text = str(error)
    # pybind11's words, of one of our functions.
    other = "incompatible function arguments" in text and hasattr(_MODULE, text.partition("(")[0])
    if other or f"module {_NAME!r} has no attribute" in text:
        reason = f"the extension was built from other sources ({text.splitlines()[0]})"
        raise ImportError(f"{reason}; {BUILD}; {SWITCH}=1 does without it") from error
