"""Loads the compiled extension himo_kernels._C once, or records why it cannot be loaded.

Without it the package lacks only the `cpu` backend. Import raises and prints nothing; the reason is
reported when the backend is requested, and once per process when "auto" has to do without it.
"""

import importlib
import importlib.util
import os
import struct
import sys
from contextlib import suppress
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

# What the package calls: a file that lacks one is of another version.
FUNCTIONS = (
    *("covariance_fwd", "covariance_bwd", "gram_fwd", "gram_bwd"),
    *("info_nce_plain", "info_nce_fwd", "info_nce_bwd", "info_nce_block_fwd", "info_nce_block_bwd"),
    *("info_nce_pairs_fwd", "info_nce_pairs_bwd", "row_products", "sigmoid_loss_fwd"),
    *("himo_loss_plain", "himo_loss_fwd", "himo_loss_bwd", "normalize_fwd", "normalize_bwd"),
    *("pca_fwd", "pca_bwd", "pca_reconstruct_fwd", "pca_reconstruct_bwd", "eigensolver"),
    *("project_reconstruct_fwd", "project_reconstruct_bwd", "pca_moment_decompose"),
    *("pca_moment_reconstruct", "pca_moment_grad_projector", "pca_moment_bwd"),
)

_SWITCHED_OFF = os.environ.get(SWITCH, "0") not in ("", "0")


def _load() -> tuple[ModuleType | None, str | None, Exception | None]:
    """Returns the module, or None with a one-line reason and the error that caused it."""
    if _SWITCHED_OFF:
        return None, f"the extension is switched off by {SWITCH}={os.environ[SWITCH]}", None
    if (cut_off := _cut_off()) is not None:
        return None, f"the extension is cut off: {cut_off}; {BUILD}", None
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


def _cut_off() -> str | None:
    """Returns the extension's path if the file ends too early, which would crash the process.

    The table of sections comes last in an ELF file. Other files are not looked at.
    """
    spec = None
    if _NAME not in sys.modules:
        with suppress(ImportError):  # which the import itself will raise again
            spec = importlib.util.find_spec(_NAME)
    if spec is None or spec.origin is None:
        return None
    with open(spec.origin, "rb") as file:
        header = file.read(64).ljust(64, b"\0")
        size = file.seek(0, os.SEEK_END)
    if not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian
        return None
    (offset,) = struct.unpack("<Q", header[40:48])
    length, count = struct.unpack("<HH", header[58:62])
    return spec.origin if offset + length * count > size else None


def _why_unfit(module: ModuleType) -> str | None:
    try:
        info = dict(module.build_info())
        built, running = str(info["torch"]), torch.__version__
    except (AttributeError, TypeError, ValueError, KeyError):
        return f"the extension is not of himo_kernels: it has no build_info ({module.__file__})"
    # The C++ ABI of torch is stable only within a minor version.
    if _minor(built) != _minor(running):
        return f"the extension is built for torch {built}, this is torch {running}"
    version = info.get("version", __version__)
    missing = [name for name in FUNCTIONS if not hasattr(module, name)]
    if version == __version__ and not missing:
        return None
    found = f"version {version}" if version != __version__ else f"it has no {missing[0]}"
    return f"the extension is of another version than himo_kernels {__version__} ({found})"


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


def explain(error: TypeError) -> None:
    """Raises ImportError if the error is that a function of the extension takes other arguments.

    Only a file of another version does: arguments are checked before they come to the extension.
    """
    text = str(error)
    if _MODULE is not None and "incompatible function arguments" in text:
        name = text.partition("(")[0]
        raise ImportError(
            f"the extension is of another version than himo_kernels {__version__} ({name} takes "
            f"other arguments); {BUILD}; {SWITCH}=1 does without it"
        ) from error
