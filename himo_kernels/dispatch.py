"""Operators and their backends: torch.library schemas, and the choice of a backend per call.

The backend is chosen in Python from shape, dtype and device alone. Its name is an argument of the
operator, so `torch.compile(fullgraph=True)` sees the same operator for every backend.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import Parameter, Signature
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from himo_kernels import extension
from himo_kernels._checks import check_choice
from himo_kernels.process_state import full_float32_matmuls, without_autocast

BACKEND_VARIABLE = "HIMO_KERNELS_BACKEND"

OPERATORS: dict[str, "Operator"] = {}  # the public operators, by name
_ALL: list["Operator"] = []  # public or not; the valid backend names are those in any table

NOT_RUN = "not yet run on hardware"  # gate of backends without hardware to test on

_LIBRARY = torch.library.Library("himo_kernels", "DEF")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    kernels maps a pass of the operator, "fwd" or "bwd", to a function of the schema's arguments
    without the trailing backend name. why_not(*tensors) returns the reason why the backend cannot
    take these tensors, or None. A backend with auto=False runs only when named; gate may state why.
    auto may also be a function of the tensors' shape, dtype and device. "auto" skips the backend if
    it returns False, because a later backend is faster for these tensors.
    plain, where the backend has it, does a whole public call that is plain; see Operator.plain.
    """

    kernels: Mapping[str, Callable[..., object]]
    why_not: Callable[..., str | None] = lambda *tensors: None
    auto: bool | Callable[..., bool] = True
    gate: str | None = None
    plain: Callable[..., Any] | None = None

    @classmethod
    def of(
        cls,
        module: object,
        operator: str,
        why_not: Callable[..., str | None] = lambda *tensors: None,
        auto: bool | Callable[..., bool] = True,
        *,
        parts: Iterable[str] = ("fwd", "bwd"),
        plain: Callable[..., Any] | None = None,
    ) -> "Backend":
        """Returns the backend of an operator whose kernels are module.<operator>_<part>."""
        kernels = {part: getattr(module, f"{operator}_{part}") for part in parts}
        return cls(kernels, why_not, auto, plain=plain)

    def suits(self, *tensors: Tensor) -> bool:
        """Returns whether "auto" may choose this backend for these tensors, if it can run."""
        return self.auto if isinstance(self.auto, bool) else self.auto(*tensors)


class Operator:
    """An operator: its kernels' schemas, and a table of the backends that implement them.

    "auto" tries the backends in the order of the table. A backend name in any operator's table is
    accepted by all operators. A non-public operator is a part of others and has no schema.
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
        schema: str | None = None,
        fake: Callable[..., object] | None = None,
        *,
        multiplies: bool = True,
        decomposes: bool = False,
    ) -> Callable[..., Any]:
        """Defines torch.ops.himo_kernels.<name>_<direction> and returns a function that calls it.

        The function skips torch's dispatcher if nothing observes the call. Small calls are then
        faster.

        The last positional argument of the schema must be `str backend`. Keyword-only arguments are
        passed to the kernels unless they are None. By default the schema is the signature of the
        reference's kernel, and the fake is that kernel on fake tensors.

        Outputs are made contiguous here, for every backend, so that the result has the strides of
        the fake. Kernels run without autocast and with full float32 matmuls. multiplies=False says
        that the pass has no matmul, so precision flags are left alone; this saves a quarter of a
        small call. decomposes=True says that an eigensolver of some backend waits for the host, so
        torch.compile leaves the operator out of its CUDA graphs.
        """

        def run(*args: object, **optional: object) -> Any:
            return self.run(direction, *args, multiplies=multiplies, **optional)

        def fake_of_reference(*args: object) -> Any:
            return self.run(direction, *args[:-1], "reference", multiplies=False)

        if schema is None:
            reference = self.backends["reference"].kernels[direction]
            inferred = torch.library.infer_schema(reference, mutates_args=())
            schema = inferred.replace(") ->", ", str backend) ->", 1)
        kernel = f"{self.name}_{direction}"
        tags = (torch.Tag.cudagraph_unsafe,) if decomposes else ()
        _LIBRARY.define(kernel + schema, tags=tags)
        _LIBRARY.impl(kernel, run, "CompositeExplicitAutograd")
        shapes = fake or fake_of_reference
        torch.library.register_fake(f"himo_kernels::{kernel}", shapes, lib=_LIBRARY)
        overload = getattr(torch.ops.himo_kernels, kernel).default

        def call(*args: object, **optional: object) -> Any:
            if torch.compiler.is_compiling() or _watched(args):
                return overload(*args, **optional)
            return run(*args, **optional)

        return call

    def run(
        self, direction: str, *args: object, multiplies: bool = True, **optional: object
    ) -> Any:
        """Returns the outputs of a pass; the last of args is the backend's name.

        Implements torch.ops.himo_kernels.<name>_<direction>. A non-public operator can only be run
        by calling this.
        """
        body = self.backends[args[-1]].kernels[direction]  # type: ignore[index]
        device = args[0].device.type  # type: ignore[attr-defined]
        given = {name: value for name, value in optional.items() if value is not None}
        precision = full_float32_matmuls(device) if multiplies else nullcontext()
        no_grad = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
        with no_grad, precision, without_autocast(device):
            outputs: Any = _called(body, *args[:-1], **given)
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

        Warns, once per process, if "auto" skips a backend because the extension is missing.

        Raises:
            ValueError: requested (or the environment variable) names no backend.
            NotImplementedError: the named backend cannot take these tensors.
        """
        requested = _requested_backend(self.name, requested)
        chosen = self._choose(requested, *tensors)
        if chosen is None:
            raise NotImplementedError(self._refusal(requested, *tensors))
        if requested == "auto" and self._lacks_extension(*tensors) and (said := extension.notice()):
            warnings.warn(f"himo_kernels: {said}", RuntimeWarning, stacklevel=3)
        return chosen

    def choose(self, requested: str, *tensors: Tensor) -> str | None:
        """Returns the backend's name like `resolve`, or None if it cannot take the tensors."""
        return self._choose(_requested_backend(self.name, requested), *tensors)

    def plain(
        self,
        requested: str,
        given: tuple[Any, ...],
        defaults: tuple[Any, ...],
        features: tuple[Tensor, ...],
        *others: Any,
    ) -> Any:
        """Returns the results of a public call that is plain, or None for any other call.

        A call is plain if nothing observes or transforms it, its other options, `given`, are the
        defaults, and the chosen backend checks and computes it, and records its gradient, in one
        function, Backend.plain(features, *others). That returns None for any call that it does not
        know to be plain and valid; the caller then takes the general way, which raises the error of
        an invalid argument. This shortens small calls.
        """
        if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
            return None
        first = features[0]  # its type is looked at first: another may raise at any attribute
        if type(first) not in _PLAIN:
            return None
        # By identity, because == may run the code of an invalid argument.
        if type(requested) is not str or not all(map(is_, given, defaults)):
            return None
        if requested == "auto":
            requested = _default_backend
        for name, backend in self.backends.items():
            if name == requested or (requested == "auto" and backend.auto is not False):
                return None if backend.plain is None else _called(backend.plain, features, *others)
        return None

    def _choose(self, requested: str, *tensors: Tensor) -> str | None:
        if requested == "auto":
            return self.preferred(*tensors)
        return requested if self.why_not(requested, *tensors) is None else None

    def preferred(self, *tensors: Tensor) -> str | None:
        """Returns the choice of "auto": the first suitable backend that can take these tensors."""
        for name, backend in self.backends.items():
            if backend.suits(*tensors) and backend.why_not(*tensors) is None:
                return name
        return None

    def _lacks_extension(self, *tensors: Tensor) -> bool:
        reason = extension.why_not()
        if reason is None or torch.compiler.is_compiling():  # a trace cannot hold a warning
            return False
        wanted = (backend for backend in self.backends.values() if backend.suits(*tensors))
        return any(backend.why_not(*tensors) == reason for backend in wanted)

    def _refusal(self, requested: str, *tensors: Tensor) -> str:
        def state(name: str) -> str:
            by_name = "" if name in self.backends and self.backends[name].auto else " by name"
            return self.why_not(name, *tensors) or f"can run{by_name}"

        got = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in tensors)
        reasons = (f"  {name}: {state(name)}" for name in backend_names())
        return "\n".join([f"{self.name}: backend {requested!r} cannot take {got}", *reasons])


def _called(kernel: Callable[..., Any], *arguments: Any, **optional: Any) -> Any:
    try:
        return kernel(*arguments, **optional)
    except (AttributeError, TypeError) as error:
        extension.explain(error)
        raise


_PLAIN = (Tensor, torch.nn.Parameter)


def _watched(arguments: Iterable[object]) -> bool:
    """Returns whether anything records, traces or transforms calls on these tensors.

    This may be a subclass of Tensor, the meta device, a dispatch or function mode, a torch.func
    transform, the vmap of is_grads_batched, a trace, or the profiler.
    """
    for value in arguments:  # a loop: every small call comes here, and any() takes twice as long
        if type(value) in _PLAIN:
            if value.is_meta or torch._C._functorch.is_legacy_batchedtensor(value):  # type: ignore[attr-defined,arg-type]
                return True
        elif isinstance(value, Tensor):
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


class _NoGraph:
    # The context of an autograd.Function's forward if no input needs a gradient.
    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def _distinct(arguments: Sequence[object]) -> list[object]:
    """The arguments, where a tensor that comes again is a view of it.

    torch.compile refuses an autograd.Function that is given the same tensor twice.
    """
    distinct: list[object] = []
    for value in arguments:
        if isinstance(value, Tensor) and any(value is before for before in distinct):
            value = value.view_as(value)
        distinct.append(value)
    return distinct


def apply_function(function: type[torch.autograd.Function], *arguments: object) -> Any:
    """Returns function.apply(*arguments), without an autograd node if no input needs a gradient.

    Without the node a small call is faster. Forward-mode AD gets the node, which raises an error.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(arguments))
    if forward_ad._current_level >= 0 or _watched(arguments):
        return function.apply(*arguments)
    if torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in arguments
    ):
        return function.apply(*arguments)
    return function.forward(_NoGraph(), *arguments)


def saves_inputs(
    operator: str, fwd: Callable[..., Any], bwd: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """Returns the autograd.Function of an operator whose backward needs only its inputs.

    fwd takes the inputs and the backend's name, and returns one tensor. bwd takes the gradient of
    this tensor and the arguments of fwd, and returns the gradients of the first inputs. The others
    have none.
    """

    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *inputs, ctx.backend = arguments
        ctx.save_for_backward(*inputs)
        return fwd(*arguments)

    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_double_backward(operator)
        grads = bwd(grad, *ctx.saved_tensors, ctx.backend)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        return *grads, *(None,) * (len(ctx.needs_input_grad) - len(grads))

    # torch.compile counts the parameters of forward, to see whether it takes ctx.
    schema = getattr(torch.ops.himo_kernels, f"{operator}_fwd").default._schema
    names = ("ctx", *(argument.name for argument in schema.arguments))
    positional = Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = Signature([Parameter(name, positional) for name in names])  # type: ignore[attr-defined]
    name = operator.title().replace("_", "")  # of grad_fn: NormalizeBackward
    passes = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), passes)


def backend_names() -> list[str]:
    """Returns the backends of all operators, in an order consistent with every table."""
    names: list[str] = []
    for operator in _ALL:
        place = len(names)
        for name in reversed(operator.backends):  # insert a new name before its successor
            if name in names:
                place = names.index(name)
            else:
                names.insert(place, name)
    return names


# Read once: a compiled graph must not depend on a variable that may change.
_default_backend = os.environ.get(BACKEND_VARIABLE, "auto")


def default_backend() -> str:
    """Returns the name that replaces "auto": HIMO_KERNELS_BACKEND as read at import, or "auto"."""
    return _default_backend


def check_backend(operator: str, backend: object, argument: str = "backend") -> str:
    """Returns backend if it is "auto" or names one; else raises an error that names argument."""
    if isinstance(backend, str):
        if backend == "auto" or any(backend in table.backends for table in _ALL):
            return backend
    return check_choice(operator, argument, backend, ["auto", *backend_names()])


def _requested_backend(operator: str, requested: str) -> str:
    if requested == _default_backend == "auto":
        return requested
    if check_backend(operator, requested) == "auto":
        return check_backend(operator, _default_backend, BACKEND_VARIABLE)
    return requested


def empty_gradients(inputs: Iterable[Tensor], needs_grad: Iterable[bool]) -> tuple[Tensor, ...]:
    """Returns the outputs of the fake of a backward: those that are not needed have no entries."""
    return tuple(
        value.new_empty(value.shape if needed else 0)
        for value, needed in zip(inputs, needs_grad, strict=True)
    )


def refuse_double_backward(operator: str) -> None:
    """Raises RuntimeError in a backward that autograd records.

    once_differentiable does not detect torch.autograd.grad(..., create_graph=True), which would
    silently return a wrong second-order gradient.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{operator}: expected a first-order gradient, got create_graph=True "
            "(double backward is not supported)"
        )
