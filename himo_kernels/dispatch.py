"""Operators and their backends: torch.library schemas, and which implementation a call takes.

A backend is chosen in Python from shape, dtype and device alone and travels through the schema as
a string, so that `torch.compile(fullgraph=True)` sees one operator whatever the backend.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo_kernels._checks import raise_type, raise_value
from himo_kernels.process_state import full_float32

BACKEND_VARIABLE = "HIMO_KERNELS_BACKEND"

OPERATORS: dict[str, "Operator"] = {}  # the public ones, by name
_ALL: list["Operator"] = []  # the names of backends are those in their tables

NOT_RUN = "not yet run on hardware"  # the gate of code that only other machines could run

_LIBRARY = torch.library.Library("himo_kernels", "DEF")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    kernels maps the operator's pass, "fwd" or "bwd", to a function of the schema's arguments
    without the trailing backend name. why_not(*tensors) returns the reason why the backend cannot
    take these tensors, or None. A backend with auto=False runs only when named; gate says what it
    waits for, where it waits. Where auto is a function of the tensors, "auto" takes the backend
    for those it returns True for, by shape, dtype and device: the others run faster on the backends
    after it.
    """

    kernels: Mapping[str, Callable[..., object]]
    why_not: Callable[..., str | None] = lambda *tensors: None
    auto: bool | Callable[..., bool] = True
    gate: str | None = None

    def suits(self, *tensors: Tensor) -> bool:
        """Returns whether "auto" may take this backend for these tensors, if it can run."""
        return self.auto if isinstance(self.auto, bool) else self.auto(*tensors)


class Operator:
    """An operator: its kernels' schemas, and a table of the backends that implement them.

    "auto" asks the backends in the order of the table; a name in any operator's table is known to
    all. An operator that is not public is a part of others, without a schema of its own.
    """

    def __init__(self, name: str, backends: Mapping[str, Backend], *, public: bool = True) -> None:
        self.name = name
        self.backends = dict(backends)
        _ALL.append(self)
        if public:
            OPERATORS[name] = self

    def define(
        self,
        direction: str,
        schema: str,
        fake: Callable[..., object],
        *,
        multiplies: bool = True,
    ) -> torch._ops.OpOverload:
        """Returns torch.ops.himo_kernels.<name>_<direction>; its last positional is `str backend`.

        Keyword-only arguments of the schema reach the kernels of a backend where they are not None.

        Outputs are made contiguous here, once for every backend, so that the strides of the fake
        are the strides of the result. Inside, dtypes follow the inputs and float32 is float32:
        multiplies=False says that no matrix product is there whose flags would have to be set and
        put back, a quarter of the time of a call on a few rows.
        """

        def run(*args: object, **optional: object) -> Any:
            return self.run(direction, *args, multiplies=multiplies, **optional)

        kernel = f"{self.name}_{direction}"
        _LIBRARY.define(kernel + schema)
        _LIBRARY.impl(kernel, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"himo_kernels::{kernel}", fake, lib=_LIBRARY)
        return getattr(torch.ops.himo_kernels, kernel).default

    def run(
        self, direction: str, *args: object, multiplies: bool = True, **optional: object
    ) -> Any:
        """Returns the outputs of a pass; the last of args names the backend.

        What its kernel under torch.ops.himo_kernels does, and the only way to run an operator that
        is not public.
        """
        body = self.backends[args[-1]].kernels[direction]  # type: ignore[index]
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        given = {name: value for name, value in optional.items() if value is not None}
        plain = full_float32(device) if multiplies else torch.autocast(device, enabled=False)
        with torch.no_grad(), plain:
            outputs: Any = body(*args[:-1], **given)
        if isinstance(outputs, Tensor):
            return outputs.contiguous()
        return tuple(output.contiguous() for output in outputs)

    def why_not(self, backend: str, *tensors: Tensor) -> str | None:
        """Returns the reason why the named backend cannot take these tensors, or None."""
        if backend not in self.backends:
            return f"{self.name} has no {backend} kernel"
        return self.backends[backend].why_not(*tensors)

    def resolve(self, requested: str, *tensors: Tensor) -> str:
        """Returns the backend's name. A named backend never falls back to another.

        Raises:
            ValueError: requested (or the environment variable) names no backend.
            NotImplementedError: the named backend cannot take these tensors.
        """
        requested = _requested_backend(self.name, requested)
        chosen = self.choose(requested, *tensors)
        if chosen is None:
            raise NotImplementedError(self._refusal(requested, *tensors))
        return chosen

    def choose(self, requested: str, *tensors: Tensor) -> str | None:
        """Returns the backend's name as `resolve` does, or None where that raises."""
        requested = _requested_backend(self.name, requested)
        if requested == "auto":
            return self.preferred(*tensors)
        return requested if self.why_not(requested, *tensors) is None else None

    def preferred(self, *tensors: Tensor) -> str | None:
        """Returns the first proven backend that can take these tensors: the choice of "auto"."""
        for name, backend in self.backends.items():
            if backend.suits(*tensors) and backend.why_not(*tensors) is None:
                return name
        return None

    def _refusal(self, requested: str, *tensors: Tensor) -> str:
        def state(name: str) -> str:
            by_name = "" if name in self.backends and self.backends[name].auto else " by name"
            return self.why_not(name, *tensors) or f"can run{by_name}"

        got = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)
        reasons = (f"  {name}: {state(name)}" for name in backend_names())
        return "\n".join([f"{self.name}: backend {requested!r} cannot take {got}", *reasons])


def backend_names() -> list[str]:
    """Returns the backends of all operators, in an order that agrees with every table."""
    names: list[str] = []
    for operator in _ALL:
        place = len(names)
        for name in reversed(operator.backends):  # a new name goes before the one after it
            if name in names:
                place = names.index(name)
            else:
                names.insert(place, name)
    return names


# Read once: a compiled graph must not depend on a variable that changes under it.
_default_backend = os.environ.get(BACKEND_VARIABLE, "auto")


def default_backend() -> str:
    """Returns what backend="auto" stands for: HIMO_KERNELS_BACKEND as read at import, or "auto"."""
    return _default_backend


def check_backend(operator: str, backend: object, argument: str = "backend") -> str:
    """Returns the name of a backend, or "auto"; an error that names the argument otherwise."""
    if not isinstance(backend, str):
        raise_type(operator, argument, "to be a string", type(backend).__name__)
    if backend != "auto" and not any(backend in table.backends for table in _ALL):
        raise_value(operator, argument, f"to be 'auto' or one of {backend_names()}", backend)
    return backend


def _requested_backend(operator: str, requested: str) -> str:
    if check_backend(operator, requested) == "auto":
        return check_backend(operator, _default_backend, BACKEND_VARIABLE)
    return requested


def refuse_double_backward(operator: str) -> None:
    """Raises RuntimeError in a backward that is itself being recorded.

    once_differentiable misses torch.autograd.grad(..., create_graph=True); a silent second-order
    gradient would be wrong.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operator}: expected a first-order gradient, got create_graph=True "
            "(double backward is not supported)"
        )
