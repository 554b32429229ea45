"""Progress bars of tasks that may be slow."""

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")
DELAY_S = 2.0  # a task that ends sooner shows no bar


def passing_bar(
    items: Iterable[_T] | None,
    what: str,
    unit: str = "it",
    *,
    total: int | None = None,
    shown: bool = True,
) -> "tqdm[_T]":
    """A bar over items, which a terminal shows while the task runs and removes at its end."""
    disable = None if shown else True  # None: shown on a terminal only
    return tqdm(items, what, total, leave=False, unit=unit, delay=DELAY_S, disable=disable)
