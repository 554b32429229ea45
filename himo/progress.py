"""Progress bars of tasks that may be slow."""

import os
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from tqdm import tqdm

from himo.errors import printable

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


def source_bar(what: str, source: str, total: int, unit: str, *, shown: bool) -> "tqdm[NoReturn]":
    """A bar of a task over a whole data set, with counts in thousands and millions. It stays."""
    name = printable(f"{what} of {os.path.basename(source)}")
    disable = not shown
    return tqdm(desc=name, total=total, unit=unit, unit_scale=True, delay=DELAY_S, disable=disable)
