"""What all integrations share: how a kind of module is described, recognised and fed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from himo_kernels import distributed
from himo_kernels._checks import raise_value

MARK = "_accelerated_by_himo_kernels"  # of a class that replaces the class of one instance


@dataclass(frozen=True)
class Kind:
    """A kind of module that can be accelerated, by replacing one method of an instance."""

    name: str
    class_of: Callable[[Any], type | None]  # the known class among a module's bases, or None
    methods: tuple[str, ...]  # of that class, which compute the result of the replaced one
    replacement: Callable[..., Callable[..., Any]]  # (module, **options) -> the new method
    options: tuple[str, ...]
    method: str = "forward"  # the replaced one


def base_named(module: Any, name: str, package: str) -> type | None:
    """Returns the class of this name, defined inside of package, among module's bases.

    Imports nothing: an instance exists only if its package is imported.
    """
    for kind in type(module).__mro__:
        if MARK in vars(kind):
            continue
        if kind.__name__ == name and f"{kind.__module__}.".startswith(f"{package}."):
            return kind
    return None


def check_settings(name: str, module: Any, settings: tuple[str, ...]) -> None:
    """Raises NotImplementedError unless module has the settings that are read at each call."""
    missing = [setting for setting in settings if not hasattr(module, setting)]
    if missing:
        raise NotImplementedError(f"accelerate: expected {name} with {settings}, got no {missing}")


def raise_setting(operator: str, setting: str, expected: str, got: object) -> NoReturn:
    """Raises the NotImplementedError for a setting that is not supported."""
    raise NotImplementedError(f"{operator}: expected {setting} {expected}, got {got}")


def as_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Returns features in the dtype that autocast would use for a matmul.

    This library's operators follow their inputs' dtype. Autocast does not change float64.
    """
    device = features[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return features
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in features)


def gathered(operator: str, x: Tensor) -> Tensor:
    """Returns the rows of all ranks, of as many each, with the exact gradient of x."""
    rows, expected = distributed.all_gather(x), dist.get_world_size() * len(x)
    if len(rows) != expected:
        of_all = f"of as many rows on every rank, {expected} in all"
        raise_value(operator, "the features", of_all, len(rows))
    return rows
