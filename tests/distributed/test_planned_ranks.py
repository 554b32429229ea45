"""The memory that `himo plan --fsdp` counts, beside that of real processes."""

import planned_worker
import pytest
from launch import found

from himo.model import CONFIGS
from himo.tools.footprint import SAVING, Rehearsal

# Of the measured peak, for what tests/himo/test_plan.py names. The peaks are those of activations:
# at the end of the backward, gloo's copy of a gradient, which NCCL does not make, would add to it.
BOUND = 0.02


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    return found("planned_worker.py", 2, tmp_path_factory.mktemp("bytes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", planned_worker.CASES)
def test_the_counted_peak_is_that_of_two_processes(measured, case):
    counted = Rehearsal(planned_worker.settings_of(case), 2).step().total
    errors = [counted / of_rank[case] - 1 for of_rank in measured]
    print(f"{case}: {[f'{error:+.3%}' for error in errors]}")
    assert all(abs(error) < BOUND for error in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_counted_parts_are_those_of_a_process(measured, tmp_path, monkeypatch, world):
    monkeypatch.setitem(CONFIGS, "blocks", planned_worker.BLOCKS)
    ranks = measured if world == 2 else found("planned_worker.py", 3, tmp_path, "parts")
    memory = Rehearsal(planned_worker.FEW, world).step()
    assert memory.phase == SAVING
    assert {name: size for name, size in memory.parts.items() if size} == ranks[0]["parts"]
