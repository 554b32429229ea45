"""HiMo-CLIP (arXiv 2511.06653) as a model, a trainer and an evaluation, on top of himo_kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from himo.checkpoint import load, save
    from himo.model import HiMoCLIP
    from himo.tokenizer import tokenize
    from himo_kernels import __version__

__all__ = ["HiMoCLIP", "__version__", "load", "save", "tokenize"]

_HOMES = {
    "HiMoCLIP": "himo.model",
    "__version__": "himo_kernels",
    "load": "himo.checkpoint",
    "save": "himo.checkpoint",
    "tokenize": "himo.tokenizer",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `himo --help` and `himo synth` need no torch, and the command sets
    # torch's environment before torch is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
