"""The memory that `himo plan --fsdp` counts is that of real processes.

Peaks are not compared: gloo, unlike NCCL, copies what it reduces and frees the copies in its own
threads, so that they differ from run to run by more than the error of the count.
"""

import planned_worker
import pytest
from launch import found

from himo.model import CONFIGS
from himo.tools.footprint import SAVING, Rehearsal


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_counted_parts_are_those_of_a_process(tmp_path, monkeypatch, world):
    monkeypatch.setitem(CONFIGS, "blocks", planned_worker.BLOCKS)
    ranks = found("planned_worker.py", world, tmp_path)
    memory = Rehearsal(planned_worker.FEW, world).step()
    assert memory.phase == SAVING
    assert {name: size for name, size in memory.parts.items() if size} == ranks[0]
