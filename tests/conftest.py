"""Fixtures of all tests: a printed seed, and uninitialised memory filled with NaN."""

import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator

# Set before torch is imported: threads that spin while waiting make the suite several times slower
# if anything else uses the processor.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# cuBLAS needs this (or :16:8) in deterministic mode, which the fixture below sets.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Set before himo_kernels and Triton are imported: without a GPU, Triton kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from himo_kernels.testing import separate_compile_cache

separate_compile_cache()

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the property tests are skipped
    pass
else:  # `make test` chooses the short one
    settings.register_profile("whole", max_examples=200)
    settings.register_profile("short", max_examples=50)
    settings.load_profile("whole")

SEED_VARIABLE = "HIMO_TEST_SEED"
# By default every change is tested on the same inputs; "random" draws others.
_given = os.environ.get(SEED_VARIABLE, "0")
if _given != "random" and not _given.isdecimal():
    raise pytest.UsageError(f"{SEED_VARIABLE}: expected a number or random, got {_given!r}")
_seed = secrets.randbelow(2**31) if _given == "random" else int(_given)


def pytest_report_header() -> str:
    return f"random inputs: {SEED_VARIABLE}={_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests each reason skipped, one line per reason; -rs prints one per place."""
    reports = terminalreporter.stats.get("skipped", [])
    # (path, line, reason) of a skip; a reason may begin with "operator, backend: ".
    reasons = [str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports]
    for reason, count in Counter(re.sub(r"^\w+, \w+: ", "", r) for r in reasons).most_common():
        terminalreporter.write_line(f"skipped {count:5}: {reason}")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow the parameter sets of `sample` tests that `make test` leaves out."""
    sets: dict[str, list[pytest.Function]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("sample"):
            sets.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in sets.values():
        can_run = [item for item in found if not _is_left_out(item)]
        sample = found[0].get_closest_marker("sample")
        chosen = _spread(can_run, *sample.args) if sample.args else _each_value_once(can_run)
        for item in can_run:
            if item not in chosen:
                item.add_marker(pytest.mark.slow)


def _is_left_out(item: pytest.Function) -> bool:
    marks = list(item.iter_markers("skipif"))
    conditions = [value for mark in marks for value in (*mark.args, mark.kwargs.get("condition"))]
    named = [item.get_closest_marker(name) for name in ("skip", "slow")]
    return any(conditions) or any(named)


def _spread(items: list[pytest.Function], count: int) -> list[pytest.Function]:
    return items[:: max(1, len(items) // count)][:count]


def _each_value_once(items: list[pytest.Function]) -> list[pytest.Function]:
    """A few items that contain every value of every parameter."""

    def values(item: pytest.Function) -> set[tuple[str, str]]:
        # By repr: some values are not hashable, and 1, 1.0 and True are equal.
        return {(name, repr(value)) for name, value in item.callspec.params.items()}

    of_item = {item: values(item) for item in items}
    left = set().union(*of_item.values())
    chosen = []
    while left:
        best = max(items, key=lambda item: len(of_item[item] & left))  # the first of equals
        chosen.append(best)
        left -= of_item[best]
    return chosen


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of this run, for processes that draw inputs of their own."""
    return _seed


def _seed_of(request: pytest.FixtureRequest) -> int:
    return _seed + sum(request.node.nodeid.encode())  # a test draws the same alone as in the suite


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A separate generator per test, the same in each run for one HIMO_TEST_SEED."""
    return torch.Generator().manual_seed(_seed_of(request))


@pytest.fixture(autouse=True)
def _seed_default_generator(request: pytest.FixtureRequest) -> None:
    # A layer's first weights come from torch's default generator.
    torch.manual_seed(_seed_of(request))


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    # In deterministic mode torch.empty returns NaN, also in C++. So an output that a kernel does
    # not write completely cannot look right by accident. torch.use_deterministic_algorithms would
    # also import the compiler, which takes seconds.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode("default")
