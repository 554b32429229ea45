"""Settings as the flags that a user types."""

from collections.abc import Mapping
from typing import Any


def flag(name: str) -> str:
    """The flag of a field: `batch_size` has --batch-size."""
    return f"--{name.replace('_', '-')}"


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Fields and their values as arguments of a command; None gives none.

    {"batch_size": 32, "same_order": True} gives ["--batch-size", "32", "--same-order"].
    """
    arguments = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif value is not None:
            arguments += [flag(name), str(value)]
    return arguments
