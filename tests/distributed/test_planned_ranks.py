"""The memory that `himo plan --fsdp` counts, beside that of real processes."""

import planned_worker
import pytest
from launch import found

from himo.model import CONFIGS, HiMoCLIP
from himo.tools.footprint import SAVING, Rehearsal

# Of the measured peak, for what tests/himo/test_plan.py names.
BOUND = 0.02
# gloo copies what it reduces, unlike NCCL, and frees the copies in its own threads: some, all or
# none of the largest, the gradients outside the blocks, are there at the peak.
MOST_COPIES = 3


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    return found("planned_worker.py", 2, tmp_path_factory.mktemp("bytes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", planned_worker.CASES)
def test_the_counted_peak_is_that_of_two_processes(measured, case):
    counted = Rehearsal(planned_worker.settings_of(case), 2).step().total
    parameters = HiMoCLIP(CONFIGS["tiny"]).named_parameters()
    copy = sum(p.nbytes for name, p in parameters if "resblocks" not in name)
    for of_rank in measured:
        peaks = [counted + copies * copy for copies in range(MOST_COPIES + 1)]
        errors = [peak / of_rank[case] - 1 for peak in peaks]
        print(f"{case}: {[f'{error:+.3%}' for error in errors]}")
        assert min(map(abs, errors)) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_counted_parts_are_those_of_a_process(measured, tmp_path, monkeypatch, world):
    monkeypatch.setitem(CONFIGS, "blocks", planned_worker.BLOCKS)
    ranks = measured if world == 2 else found("planned_worker.py", 3, tmp_path, "parts")
    memory = Rehearsal(planned_worker.FEW, world).step()
    assert memory.phase == SAVING
    assert {name: size for name, size in memory.parts.items() if size} == ranks[0]["parts"]
