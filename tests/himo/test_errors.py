"""What an error message says of a value from outside: in few characters, whatever the value is."""

import time

import pytest

from himo.errors import quoted, shortened

doubled: tuple = ()
for _ in range(100):
    doubled = (doubled, doubled)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\nb", "'a\\nb'"),
        (b"\x1b", "b'\\x1b'"),
        (None, "None"),
        (1.5, "1.5"),
        (1 << 300, "an integer of 301 bits"),
        (["c", 7], "['c', 7]"),
        ({"height": 4}, "{'height': 4}"),
        ([[1], {}], "[a list, a dict]"),
        ([1] * 5, "a list"),
        (doubled, "[a tuple, a tuple]"),
        ("x" * 81, "'" + "x" * 76 + "..."),
        (["x" * 50, "y" * 50], "['" + "x" * 50 + "', '" + "y" * 21 + "..."),
    ],
)
def test_a_value_is_quoted_in_at_most_80_characters(value: object, expected: str) -> None:
    begun = time.perf_counter()
    assert quoted(value) == expected
    assert len(expected) <= 80
    assert time.perf_counter() - begun < 1


def test_a_name_is_cut_after_80_characters() -> None:
    assert shortened("a" * 80) == "a" * 80
    assert shortened("a" * 81) == "a" * 77 + "..."
