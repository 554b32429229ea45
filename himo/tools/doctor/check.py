"""One finding of `himo doctor`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """What was checked, what was found, and whether it stops training.

    `found` is one sentence; for a warning or a problem it says what to do.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str


def size(count: float) -> str:
    """Bytes for people: 3.2 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
