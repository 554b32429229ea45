"""pytest-benchmark on small cells of the registry: `pytest benchmarks`.

For a quick comparison of two commits (--benchmark-save, --benchmark-compare). Quote figures from
run.py, which checks accuracy, interleaves candidates and records the machine.
"""

import pytest
import torch

from benchmarks.cases import MODES, OPTIONS, Case
from benchmarks.measure import make_problem, step
from benchmarks.registry import candidates

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [128, 1024])
@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_what_auto_takes(benchmark, op, size, mode, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    problem = make_problem(Case(op, size), device)
    (chosen,) = (c for c in candidates(problem.case, problem.inputs) if c.auto)
    run = step(chosen, problem, mode)

    def finished():
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = f"{op} {problem.case.size} {mode} {device}"
    benchmark.extra_info["backend"] = chosen.name
    assert benchmark(finished) is not None
