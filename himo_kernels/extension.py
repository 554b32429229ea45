"""Loads the compiled extension himo_kernels._C once, or records why it cannot be loaded.

Without it the package lacks only the `cpu` backend. Import raises and prints nothing; the reason is
reported when the backend is requested.
"""

import importlib
import os
from types import ModuleType

import torch

SWITCH = "HIMO_KERNELS_NO_EXTENSION"
REBUILD = "pip install --no-build-isolation -e ."


def _load() -> tuple[ModuleType | None, str | None, ImportError | None]:
    """Returns the module, or None with a one-line reason and the error that caused it."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return None, f"the extension is switched off by {SWITCH}={os.environ[SWITCH]}", None
    try:
        module = importlib.import_module("himo_kernels._C")
    except ModuleNotFoundError as error:
        return None, f"the extension is not built ({error}); build it with: {REBUILD}", error
    except ImportError as error:  # usually a symbol that this version of torch lacks
        text = str(error).splitlines()[0]
        return None, f"the extension cannot be loaded ({text}); rebuild it with: {REBUILD}", error
    built, running = module.build_info()["torch"], torch.__version__
    # The C++ ABI of torch is stable only within a minor version.
    if _minor(built) != _minor(running):
        reason = f"the extension is built for torch {built}, this is torch {running}"
        return None, f"{reason}; rebuild it with: {REBUILD}", None
    return module, None, None


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


_MODULE, _REASON, _ERROR = _load()


def why_not() -> str | None:
    """Returns a one-line reason why the extension cannot be used, or None. Traced by compile."""
    return _REASON


def load() -> ModuleType:
    """Returns himo_kernels._C. Raises ImportError, chained to its cause, if it is not loaded."""
    if _MODULE is None:
        raise ImportError(_REASON) from _ERROR
    return _MODULE
