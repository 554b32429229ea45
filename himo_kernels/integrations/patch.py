"""Replaces one method of one instance and changes nothing else."""

import copy
import copyreg
from collections.abc import Callable
from types import MethodType, TracebackType
from typing import Any, Generic, NoReturn, SupportsIndex, TypeVar

from torch.nn.parallel import DistributedDataParallel

from himo_kernels._checks import raise_type, raise_value
from himo_kernels.integrations import (
    grad_cache,
    himo_clip,
    lightly,
    metric_learning,
    open_clip,
    sentence_transformers,
)
from himo_kernels.integrations.kinds import MARK, Kind

Module = TypeVar("Module")

_ITSELF = "itself, which was accelerated in place"

KINDS: tuple[Kind, ...] = (
    *open_clip.KINDS,
    *himo_clip.KINDS,
    *sentence_transformers.KINDS,
    *metric_learning.KINDS,
    *lightly.KINDS,
    *grad_cache.KINDS,
)


class Accelerated(Generic[Module]):
    """An accelerated module, until `undo()` or the end of a `with` block."""

    def __init__(
        self, module: Module, inner: Any, name: str, replacement: Callable[..., Any]
    ) -> None:
        self.module = module  # as it was given
        self._inner = inner  # what DistributedDataParallel wraps; otherwise module itself
        self._name = name
        if name == "__call__":  # looked up on the class, never on the instance
            self._class = type(inner)
            self._new: Any = _subclass(self._class, replacement)
            inner.__class__ = self._new
            return
        # A bound method, so that a deep copy of the module gets one bound to the copy.
        self._new = MethodType(replacement, inner)
        setattr(inner, name, self._new)

    def undo(self) -> None:
        """Restores the module's own method; a second call does nothing."""
        if not self._is_on():
            return
        if self._name == "__call__":
            self._inner.__class__ = self._class
        else:
            delattr(self._inner, self._name)

    def _is_on(self) -> bool:
        if self._name == "__call__":
            return type(self._inner) is self._new
        return vars(self._inner).get(self._name) is self._new

    # For the mistake loss = accelerate(loss): the errors point to the module.

    def __call__(self, *arguments: Any, **keywords: Any) -> NoReturn:
        raise_type("accelerate", "the module to be called", _ITSELF, "a call of what it returned")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"accelerate: expected {name} of the module {_ITSELF}, got {name} of what it returned"
        )

    def __enter__(self) -> Module:
        if not self._is_on():
            raise_value("accelerate", "a with block", "before undo()", "one after it")
        return self.module

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def accelerate(module: Module, **options: Any) -> Accelerated[Module]:
    """Makes an existing loss or model compute the same with the operators of this library.

    The module keeps its class, parameters, state_dict and call signature. Only this instance
    changes, immediately; the end of a `with` block, or `undo()`, restores it.

        himo_kernels.accelerate(loss)                  # an open_clip.ClipLoss, for example
        himo_kernels.accelerate(model)                 # CLIP of the released HiMo-CLIP code
        with himo_kernels.accelerate(loss) as loss:    # inside the block only

    Args:
        module: one of these, also inside DistributedDataParallel:
            open_clip's ClipLoss, CoCaLoss (its contrastive half) and SigLipLoss;
            the released HiMo-CLIP model;
            sentence-transformers' MultipleNegativesRankingLoss, its cached form, and the
            symmetric forms derived from them;
            pytorch-metric-learning's NTXentLoss and SupConLoss;
            lightly's NTXentLoss;
            GradCache's SimpleContrastiveLoss and DistributedContrastiveLoss.
            README.md lists the settings that are supported and those that are refused. Settings
            are read at each call. Call before torch.compile. A deep copy is accelerated too, a
            pickle is not. A shallow copy, such as a replica of DataParallel, computes with the
            parameters of the original.
        options: `backend`, as in `himo_kernels.info_nce`, for every loss; for open_clip's losses
            also `strategy`, as in `himo_kernels.distributed.info_nce`. For a HiMo-CLIP model, the
            arguments of `himo_kernels.nn.HiMoLoss` except variance_threshold and both weights,
            which its trainer sets; the default preset is "official", the values and gradients of
            the released code.

    Raises:
        TypeError: module is none of these, or an option is unknown.
        ValueError: module is already accelerated, or an option has an invalid value.
        NotImplementedError: module's class derives from the known one and overrides its methods; or
            it has a setting that is not supported; or its version lacks settings that are read.
            A setting changed later raises at the call.
    """
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    for kind in KINDS:
        known = kind.class_of(inner)
        if known is not None:
            unknown = [name for name in options if name not in kind.options]
            if unknown:
                raise_type("accelerate", "options", f"among {list(kind.options)}", unknown)
            _check_methods(kind, known, inner)
            return Accelerated(module, inner, kind.method, kind.replacement(inner, **options))
    names = dict.fromkeys(kind.name for kind in KINDS)
    raise_type("accelerate", "module", f"to be {' or '.join(names)}", _full_name(type(inner)))


def _check_methods(kind: Kind, known: type, module: Any) -> None:
    for name in kind.methods:
        method, found = getattr(known, name, None), getattr(type(module), name, None)
        # An unpickled module has its class's forward as an attribute of the instance.
        own = vars(module).get(name)
        if found is not method and MARK in vars(type(module)):
            own = found
        elif found is not method:
            raise NotImplementedError(
                f"accelerate: expected {kind.name}, got {type(module).__name__} with a {name} of "
                "its own"
            )
        if own is not None and getattr(own, "__func__", None) is not method:
            expected = f"with the {name} of its class"
            raise_value("accelerate", "module", expected, _full_name(own))


def _subclass(kind: type, call: Callable[..., Any]) -> type:
    # The class with another __call__. A deep copy is accelerated too; a pickle opens as `kind`.
    def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def reduce(self: Any, protocol: SupportsIndex) -> tuple[Any, ...]:
        return copyreg._reconstructor, (kind, object, None), vars(self)  # type: ignore[attr-defined]

    names = {"__call__": call, "__deepcopy__": deep_copy, "__reduce_ex__": reduce}
    return type(kind.__name__, (kind,), names | {"__module__": kind.__module__, MARK: True})


def _full_name(value: Any) -> str:
    # Not repr: a bound method's repr prints the module, hundreds of lines for a CLIP.
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
