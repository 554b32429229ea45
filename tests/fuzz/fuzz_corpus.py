"""Corpora of bad input: which inputs `make test` runs, and the bounds that every one must hold."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def corpus(inputs: Mapping[str, Any], sample: int = 4) -> list[Any]:
    """Returns pytest parameters, one an input, named by its key.

    `make test` runs `sample` of them, evenly spread; `make fuzz` and `make test-all` run them all.
    """
    step = max(1, len(inputs) // sample)
    return [
        pytest.param(value, id=name, marks=[] if number % step == 0 else pytest.mark.slow)
        for number, (name, value) in enumerate(inputs.items())
    ]


@contextmanager
def bounded(seconds: float, mebibytes: float) -> Iterator[None]:
    """Fails when the block takes more processor time or more memory than stated.

    Processor time, because time lost to other processes is not the reader's. The bound holds for a
    core that runs Python as fast as `_PACE` says, and grows on a slower or shared one. Memory is
    the growth of the peak resident size of this process.
    """
    seconds *= max(1.0, _seconds_of_a_loop() / _PACE)
    _RESET.write_text("5")  # the peak from here on
    before, start = _mebibytes("VmRSS"), time.process_time()
    yield
    taken, grown = time.process_time() - start, _mebibytes("VmHWM") - before
    assert taken <= seconds, f"{taken:.2f} s of processor time, expected at most {seconds}"
    assert grown <= mebibytes, f"{grown:.0f} MiB more memory, expected at most {mebibytes}"


# Processor seconds of the loop below in CPython 3.11 on an idle AMD EPYC of the Zen 3 kind.
_PACE = 0.02


def _seconds_of_a_loop() -> float:
    start, total = time.process_time(), 0
    for number in range(300_000):
        total += number
    return time.process_time() - start


def _mebibytes(field: str) -> float:
    return int(_STATUS.read_text().partition(f"{field}:")[2].split()[0]) / 1024
