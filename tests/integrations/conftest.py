"""What the tests of other libraries' losses share."""

import pytest
from operator_calls import tell


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the operators of this library that compute a call, in order."""
    calls: list[str] = []
    tell(calls.append, monkeypatch)
    return calls
