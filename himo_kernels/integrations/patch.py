"""One object at a time: its forward is replaced on the instance, and nothing else is touched."""

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
    """Something that can be accelerated."""

    name: str
    class_of: Callable[[nn.Module], type | None]  # the one of a module's classes that is known
    methods: tuple[str, ...]  # of that class: what its forward computes is their work
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
        self._inner = inner  # of DistributedDataParallel; module itself where there is none
        # A bound method: a deep copy of the module gets one bound to the copy.
        self._forward = MethodType(forward, inner)
        inner.forward = self._forward

    def undo(self) -> None:
        """Gives the module its own forward back; a second call does nothing."""
        if self._is_on():
            del self._inner.forward

    def _is_on(self) -> bool:
        return vars(self._inner).get("forward") is self._forward

    # For loss = accelerate(loss): what is missed here is there on the module.

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
    """A loss or a model of someone else's, computing the same with the operators of this library.

    The module stays what it was: its class, parameters, state_dict and call. Only this instance
    changes, at once; a `with` block or `undo()` on what is returned changes it back.

        himo_kernels.accelerate(loss)                  # an open_clip.ClipLoss
        himo_kernels.accelerate(model)                 # CLIP of the released HiMo-CLIP code
        with himo_kernels.accelerate(loss) as loss:    # inside the block only

    Args:
        module: open_clip's ClipLoss, or the released HiMo-CLIP model, also inside
            DistributedDataParallel. Before torch.compile. A deep copy is accelerated too, a
            pickle is not; a shallow copy, and so a replica of DataParallel, computes with the
            parameters of the original.
        options: of a ClipLoss `strategy` and `backend` as in `himo_kernels.distributed.info_nce`;
            of a HiMo-CLIP model the arguments of `himo_kernels.nn.HiMoLoss` but for
            variance_threshold and component_weight, which its trainer sets; the preset is
            "official", the released code's values and gradients, unless it says otherwise.

    Raises:
        TypeError: module is neither, or an option is unknown.
        ValueError: module has been accelerated already, or an option has an impossible value.
        NotImplementedError: module's class derives from the known one and computes something else;
            or it is a ClipLoss over Horovod, or of a version without the settings that are read.
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
        # One of an opened pickle has the forward of its class on the instance.
        if own is not None and getattr(own, "__func__", None) is not method:
            expected = f"with the {name} of its class"
            raise_value("accelerate", "module", expected, _full_name(own))


def _full_name(value: Any) -> str:
    # Not its repr: a bound method's shows the module, of a CLIP hundreds of lines.
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__name__)}"
