"""Replaces the forward of one instance and changes nothing else."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any, Generic, NoReturn, TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from himo_kernels._checks import raise_type, raise_value
from himo_kernels.integrations import himo_clip, open_clip

Module = TypeVar("Module", bound=nn.Module)

_ITSELF = "itself, which was accelerated in place"


@dataclass(frozen=True)
class Kind:
    """A kind of module that can be accelerated."""

    name: str
    class_of: Callable[[nn.Module], type | None]  # the known class among a module's bases, or None
    methods: tuple[str, ...]  # of that class, which compute its forward's result
    forward_of: Callable[..., Callable[..., Any]]  # (module, **options) -> its new forward
    options: tuple[str, ...]


KINDS = (
    Kind(
        "open_clip's ClipLoss",
        open_clip.class_of,
        open_clip.METHODS,
        open_clip.forward_of,
        open_clip.OPTIONS,
    ),
    Kind(
        "the CLIP model of the released HiMo-CLIP code",
        himo_clip.class_of,
        himo_clip.METHODS,
        himo_clip.forward_of,
        himo_clip.OPTIONS,
    ),
)


class Accelerated(Generic[Module]):
    """An accelerated module, until `undo()` or the end of a `with` block."""

    def __init__(self, module: Module, inner: nn.Module, forward: Callable[..., Any]) -> None:
        self.module = module  # as it was given
        self._inner = inner  # what DistributedDataParallel wraps; otherwise module itself
        # A bound method, so that a deep copy of the module gets one bound to the copy.
        self._forward = MethodType(forward, inner)
        inner.forward = self._forward

    def undo(self) -> None:
        """Restores the module's own forward; a second call does nothing."""
        if self._is_on():
            del self._inner.forward

    def _is_on(self) -> bool:
        return vars(self._inner).get("forward") is self._forward

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

    The module keeps its class, parameters, state_dict and call signature. Only the forward of this
    instance changes, immediately; the end of a `with` block, or `undo()`, restores it.

        himo_kernels.accelerate(loss)                  # an open_clip.ClipLoss
        himo_kernels.accelerate(model)                 # CLIP of the released HiMo-CLIP code
        with himo_kernels.accelerate(loss) as loss:    # inside the block only

    Args:
        module: open_clip's ClipLoss, or the released HiMo-CLIP model, also inside
            DistributedDataParallel. Call before torch.compile. A deep copy is accelerated
            too, a pickle is not. A shallow copy, such as a replica of DataParallel, computes with
            the parameters of the original.
        options: for a ClipLoss, `strategy` and `backend` as in `himo_kernels.distributed.info_nce`.
            For a HiMo-CLIP model, the arguments of `himo_kernels.nn.HiMoLoss` except
            variance_threshold and both weights, which its trainer sets; the default preset is
            "official", the values and gradients of the released code.

    Raises:
        TypeError: module is neither, or an option is unknown.
        ValueError: module is already accelerated, or an option has an invalid value.
        NotImplementedError: module's class derives from the known one and overrides its methods; or
            it is a ClipLoss with Horovod, or of a version without the settings that are read.
    """
    if not isinstance(module, nn.Module):
        raise_type("accelerate", "module", "to be a torch.nn.Module", type(module).__name__)
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    for kind in KINDS:
        known = kind.class_of(inner)
        if known is not None:
            unknown = [name for name in options if name not in kind.options]
            if unknown:
                raise_type("accelerate", "options", f"among {list(kind.options)}", unknown)
            _check_methods(kind, known, inner)
            return Accelerated(module, inner, kind.forward_of(inner, **options))
    expected = "to be " + " or ".join(kind.name for kind in KINDS)
    raise_type("accelerate", "module", expected, _full_name(type(inner)))


def _check_methods(kind: Kind, known: type, module: nn.Module) -> None:
    for name in kind.methods:
        method = getattr(known, name, None)
        if getattr(type(module), name, None) is not method:
            raise NotImplementedError(
                f"accelerate: expected {kind.name}, got {type(module).__name__} with a {name} of "
                "its own"
            )
        own = vars(module).get(name)
        # An unpickled module has its class's forward as an attribute of the instance.
        if own is not None and getattr(own, "__func__", None) is not method:
            expected = f"with the {name} of its class"
            raise_value("accelerate", "module", expected, _full_name(own))


def _full_name(value: Any) -> str:
    # Not repr: a bound method's repr prints the module, hundreds of lines for a CLIP.
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
