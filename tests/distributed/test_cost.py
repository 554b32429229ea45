"""The cost of a step in README.md: bytes against the count, memory as measured."""

import re
from pathlib import Path

import pytest
from launch import found

import himo_kernels.distributed
from himo_kernels.distributed.cost import step_flops, step_traffic

README = Path(himo_kernels.distributed.__file__).with_name("README.md")


@pytest.mark.slow
def test_memory_of_the_ring_does_not_grow_with_the_ranks(tmp_path):
    peaks = {}
    for world in (2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        # Freed memory is returned at once, so that resident memory is the memory in use.
        ranks = found("memory_worker.py", world, folder, MALLOC_MMAP_THRESHOLD_="65536")
        for strategy in ("ring", "gather"):
            peaks[strategy, world] = max(rank[strategy] for rank in ranks)
    print(peaks)
    assert peaks["ring", 4] <= 1.15 * peaks["ring", 2], peaks
    assert peaks["gather", 4] >= 1.4 * peaks["gather", 2], peaks  # otherwise this measures nothing
    assert peaks["ring", 4] < 0.6 * peaks["gather", 4], peaks


def test_the_table_of_the_readme_is_the_cost_model():
    rows, features = 128, 768
    table = re.findall(
        r"^\| (\d+) \| (\d+) " + r"\| ([\d.]+) " * 4 + r"\|$", README.read_text(), re.M
    )
    assert [int(row[0]) for row in table] == [2, 4, 8, 64, 1024]
    for ranks, total, *shown in table:
        sent = [
            sum(step_traffic(int(ranks), rows, features, **options).values()) / 1e6
            for options in ({}, {"strategy": "ring"}, {"scope": "local"})
        ]
        expected = [
            sent[0],
            sent[1],
            sent[0] - sent[2],
            step_flops(int(ranks), rows, features) / 1e9,
        ]
        assert int(total) == int(ranks) * rows
        assert shown == [f"{value:.1f}" for value in expected]
