"""What the tests of other libraries' losses share."""

from typing import Any

import pytest

from himo_kernels.dispatch import OPERATORS


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the operators of this library that compute a call, in order.

    A plain call is computed in one function; any other is resolved to a backend.
    """
    calls: list[str] = []
    for operator in OPERATORS.values():

        def resolved(*arguments: Any, of: Any = operator, resolve: Any = operator.resolve) -> str:
            calls.append(of.name)
            return resolve(*arguments)

        def plain(*arguments: Any, of: Any = operator, compute: Any = operator.plain) -> Any:
            found = compute(*arguments)
            if found is not None:
                calls.append(of.name)
            return found

        monkeypatch.setattr(operator, "resolve", resolved)
        monkeypatch.setattr(operator, "plain", plain)
    return calls
