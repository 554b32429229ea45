"""Shared by the tests of plain calls (Operator.plain): who answered, what observes, same bits."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from himo_kernels import dispatch
from himo_kernels.dispatch import Operator
from himo_kernels.info_nce import api


def set_plain(
    patch: pytest.MonkeyPatch, operators: tuple[Operator, ...], wrap: Callable[[Any], Any]
) -> None:
    """Replaces the function for plain calls of each operator by wrap(it)."""
    for operator in operators:
        backend = operator.backends["cpu"]
        changed = dataclasses.replace(backend, plain=wrap(backend.plain))
        patch.setattr(operator, "backends", operator.backends | {"cpu": changed})


def record_answers(patch: pytest.MonkeyPatch, *operators: Operator) -> list[bool]:
    """Returns a list of whether the function answered, for each later call that reaches it."""
    # The suite may run under HIMO_KERNELS_BACKEND or HIMO_KERNELS_LOGITS_MIB.
    patch.setattr(dispatch, "_default_backend", "auto")
    patch.setattr(api, "_logits_mib", None)
    found: list[bool] = []

    def wrap(plain: Any) -> Any:
        def recorded(*arguments: Any) -> Any:
            results = plain(*arguments)
            found.append(results is not None)
            return results

        return recorded

    set_plain(patch, operators, wrap)
    return found


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
        assert torch.equal(got.isnan(), wanted.isnan())
        assert not got.requires_grad


def detached(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in tensors)


def weights_of(losses: tuple[Tensor, ...]) -> list[Tensor]:
    """Returns an incoming gradient for each loss."""
    return [loss.detach() + index - 0.5 for index, loss in enumerate(losses)]


def gradients(
    losses: tuple[Tensor, ...], inputs: list[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(losses, inputs, weights_of(losses), **options)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[..., :1, :].expand_as(x),
    "NaN": lambda x: x.clone().fill_(float("nan")),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "negative view": torch._neg_view,
}
# Those that may require a gradient and are plain.
LEAF_LAYOUTS = sorted(LAYOUTS.keys() - {"parameter", "negative view"})


SCALES: dict[str, tuple[Any, bool]] = {  # a scale, and whether it is plain
    "number": (10.1, True),  # rounded to float32, as a tensor of it would be
    "negative": (-3.0, True),
    "float64": (torch.tensor(10.1, dtype=torch.float64), True),
    "bfloat16": (torch.tensor(10.1, dtype=torch.bfloat16), True),
    "[1]": (torch.tensor([10.1]), True),
    "infinite tensor": (torch.tensor(float("inf")), True),
    "integer": (10, False),
    "numpy number": (numpy.float64(10.1), False),
    "infinity": (float("inf"), False),
}


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


class _Function(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


OBSERVERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a dispatch mode": _Dispatch,
    "a function mode": _Function,
    "the profiler": torch.profiler.profile,
    "forward-mode AD": forward_ad.dual_level,
}
# Those of a backward.
BACKWARD_OBSERVERS = sorted(OBSERVERS.keys() - {"forward-mode AD"})


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
