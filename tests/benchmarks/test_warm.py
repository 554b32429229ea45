"""Kernels compiled before a run on a GPU are those that the run launches. Needs no GPU."""

import json

import pytest
from fresh_process import run_python

pytest.importorskip("triton", reason="needs Triton")

SCRIPT = """
import json
import random

import torch

from benchmarks import warm
from himo_kernels import _triton, aot
from himo_kernels.aot import Case

def keys(*cases):
    return {key for key, _ in warm.distinct(cases)}

def dual(samples):
    return Case("", lambda: warm._losses("dual_info_nce", samples, torch.bfloat16, 0.0, True))

head = Case("", lambda: warm._head(128, torch.bfloat16))
counts = {}
compiled = keys(*map(dual, warm.SAMPLES))
others = [random.Random(0).randint(100, 40_000) for _ in range(60)]
more = keys(*map(dual, others)) - compiled
counts["batch sizes"] = [len(compiled), len(more)]

cases = [case for case in aot.cases() if "bfloat16" in case.label and "N=8192" in case.label]
launches = {launch for case in cases for launch in aot.launches(case, 90)}
counts["aot"] = [len(launches), len(keys(*cases))]

without = keys(head)
_triton.capability = lambda x: 90  # as of the device that is not here
warm._meta = lambda *shape, dtype=torch.float32: torch.ones(shape).to(dtype)
counts["memory"] = [len(without), len(keys(head) ^ without)]
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, list[int]]:
    # In a fresh process: kernels defined for the interpreter have no key.
    return json.loads(run_python("-c", SCRIPT, TRITON_INTERPRET="0"))


def test_other_batch_sizes_compile_no_other_kernel(counts):
    compiled, more = counts["batch sizes"]
    assert compiled > 0
    assert more == 0


def test_tensors_with_memory_launch_the_kernels_of_those_without(counts):
    kernels, different = counts["memory"]
    assert kernels > 0
    assert different == 0


def test_aot_tells_kernels_apart_as_triton_does(counts):
    launches, kernels = counts["aot"]
    assert launches == kernels > 0


@pytest.mark.slow
def test_a_second_run_finds_every_kernel_in_the_cache(tmp_path):
    told = [
        run_python(
            *("-m", "benchmarks.warm", "--first", "1", "--processes", "1"),
            TRITON_INTERPRET="0",
            TRITON_CACHE_DIR=str(tmp_path),
        ).splitlines()[-1]
        for _ in range(2)
    ]
    assert told[0].startswith("1 compiled, 0 found in the cache, 0 failed")
    assert told[1].startswith("0 compiled, 1 found in the cache, 0 failed")


def test_kernels_of_the_interpreter_are_not_compiled():
    with pytest.raises(AssertionError, match="expected no TRITON_INTERPRET=1"):
        run_python("-m", "benchmarks.warm", "--first", "1", TRITON_INTERPRET="1")
