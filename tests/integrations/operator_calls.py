"""Which operators of this library compute a call."""

from collections.abc import Callable
from typing import Any

import pytest

from himo_kernels.dispatch import OPERATORS


def tell(told: Callable[[str], object], patch: pytest.MonkeyPatch) -> None:
    """From now on `told` is called with the name of each operator that computes a call.

    A plain call is computed in one function; any other is resolved to a backend.
    """
    for operator in OPERATORS.values():

        def resolved(*arguments: Any, of: Any = operator, resolve: Any = operator.resolve) -> str:
            told(of.name)
            return resolve(*arguments)

        def plain(*arguments: Any, of: Any = operator, compute: Any = operator.plain) -> Any:
            found = compute(*arguments)
            if found is not None:
                told(of.name)
            return found

        patch.setattr(operator, "resolve", resolved)
        patch.setattr(operator, "plain", plain)
