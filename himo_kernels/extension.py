"""The compiled extension himo_kernels._C: loaded once, here, and why not where it is not.

The package works without it; what it costs is the `cpu` backend. Nothing is raised or printed at
import: the one who asks for the backend is told the reason.
"""

import importlib
import os
from types import ModuleType

import torch

SWITCH = "HIMO_KERNELS_NO_EXTENSION"
REBUILD = "pip install --no-build-isolation -e ."


def _load() -> tuple[ModuleType | None, str | None, ImportError | None]:
    """Returns the module, or None with the reason in one line and the error behind it."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        return None, f"the extension is switched off by {SWITCH}={os.environ[SWITCH]}", None
    try:
        module = importlib.import_module("himo_kernels._C")
    except ModuleNotFoundError as error:
        return None, f"the extension is not built ({error}); build it with: {REBUILD}", error
    except ImportError as error:  # most often a symbol that another torch has and this one lacks
        text = str(error).splitlines()[0]
        return None, f"the extension cannot be loaded ({text}); rebuild it with: {REBUILD}", error
    built, running = module.build_info()["torch"], torch.__version__
    # The C++ interface of torch is stable within a minor version, not across.
    if _minor(built) != _minor(running):
        reason = f"the extension is built for torch {built}, this is torch {running}"
        return None, f"{reason}; rebuild it with: {REBUILD}", None
    return module, None, None


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


_MODULE, _REASON, _ERROR = _load()


def why_not() -> str | None:
    """Returns why the extension cannot be used, in one line, or None. torch.compile traces it."""
    return _REASON


def load() -> ModuleType:
    """Returns the module himo_kernels._C. Raises ImportError, from the first cause, without it."""
    if _MODULE is None:
        raise ImportError(_REASON) from _ERROR
    return _MODULE
