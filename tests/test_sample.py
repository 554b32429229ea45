"""The marker `sample`: the parameter sets that `make test` runs."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

SETS = """
import pytest

sample = pytest.mark.sample

@sample
@pytest.mark.parametrize("first", [[1], [2], [3]])
@pytest.mark.parametrize("second", ["x", "y"])
def test_values_without_a_hash(first, second): pass

@sample
@pytest.mark.parametrize("value", [1, 1.0, True])
def test_values_that_are_equal(value): pass

@sample(2)
@pytest.mark.parametrize("value", range(9))
def test_a_number(value): pass

@sample
@pytest.mark.parametrize("first", [1, 2])
class TestClass:
    @pytest.mark.parametrize("second", [1, 2])
    def test_method(self, first, second): pass

@pytest.fixture(params=[1, 2])
def fixture(request): pass

@sample
@pytest.mark.parametrize("second", [1, 2])
def test_fixture(fixture, second): pass

@sample
def test_no_parameters(): pass

@sample
@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("second", [1, 2])
def test_partly_slow(first, second): pass

@sample
@pytest.mark.parametrize("value", [1, 2])
@pytest.mark.skipif(condition=True, reason="as it is")
def test_skipped(value): pass
"""
KEPT = """
test_values_without_a_hash[x-first0]
test_values_without_a_hash[x-first2]
test_values_without_a_hash[y-first1]
test_values_that_are_equal[1]
test_values_that_are_equal[1.0]
test_values_that_are_equal[True]
test_a_number[0]
test_a_number[4]
TestClass::test_method[1-1]
TestClass::test_method[2-2]
test_fixture[1-1]
test_fixture[2-2]
test_no_parameters
test_partly_slow[1-2]
test_partly_slow[2-2]
test_skipped[1]
test_skipped[2]
"""


def test_what_is_kept(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    slow: left out\n    sample: a part of it is slow")
    pytester.makepyfile(test_sets=SETS)
    result = pytester.runpytest_inprocess("--collect-only", "-q", "-m", "not slow")
    kept = {line.removeprefix("test_sets.py::") for line in result.outlines if "::" in line}
    assert kept == set(KEPT.split())
