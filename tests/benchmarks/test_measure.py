"""The harness: accuracy before time, peak memory, failures as rows."""

import dataclasses
import json
import os
import re
import time

import pytest
import torch
from fresh_process import run_python

from benchmarks import measure, memory, worker
from benchmarks.baselines import forms, libraries
from benchmarks.cases import OPTIONS, Case
from benchmarks.registry import OPERATIONS, Candidate, candidates
from himo_kernels.dispatch import OPERATORS, Backend
from himo_kernels.testing import relative_error

SMALL = {"N": 24, "D": 8}
needs_proc = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def cell(case: Case, **settings) -> worker.Cell:
    settings = {"compile": False, "memory": False} | settings
    settings.setdefault("ceilings", {"float32": 1.0, "copy": 10.0})
    return worker.Cell(case, "cpu", seconds=0.0, **settings)


@pytest.fixture
def unlimited(monkeypatch):
    """Short cells in the tests' process, whose memory must not be limited."""
    monkeypatch.setattr(memory, "limit_to_free_memory", lambda: None)
    monkeypatch.setattr(measure, "LONG_MS", 0.0)  # one call per round


@pytest.mark.parametrize("spectrum", ["power-law", "duplicates"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.sample
def test_the_library_and_plain_pytorch_pass_on_every_operator(op, dtype, spectrum):
    case = Case(op, **SMALL, dtype=dtype, spectrum=spectrum, share=0.5)
    problem = measure.make_problem(case, "cpu")
    found = candidates(case, problem.inputs)
    oracle = measure.make_oracle(problem, "cpu", official=any(c.official for c in found))
    checked = set()
    for candidate in found:
        hard = spectrum == "duplicates" and not candidate.library  # the SVD's gradient may be NaN
        # Libraries that round the logits to bfloat16; a row of theirs states the error.
        hard |= dtype == "bfloat16" and candidate.name in forms.PUBLISHED
        if candidate.refusal is None and not candidate.compiled and not hard:
            assert measure.accuracy(candidate, oracle)[1] is None, candidate.name
            checked.add(candidate.name)
    assert checked & {"auto", "reference"}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("rows", "sentence-transformers"),
        ("negatives", "sentence-transformers"),
        ("labels", "pytorch-metric-learning"),
        ("simclr", "lightly"),
        ("exclude", None),
    ],
)
def test_another_library_computes_the_form_that_it_is_compared_with(form, name):
    problem = measure.make_problem(
        Case("info_nce_pairs", **SMALL, form=form, dtype="float64"), "cpu"
    )
    oracle = measure.make_oracle(problem, "cpu", official=False)
    found = {
        c.name: c
        for c in candidates(problem.case, problem.inputs)
        if c.refusal != "is not installed" and not c.compiled
    }
    if name is not None and name not in found:
        pytest.skip(f"{name} is not installed (make setup)")
    able = {name for name, c in found.items() if c.refusal is None}
    assert able & set(forms.PUBLISHED) == {name} - {None}
    for candidate in map(found.get, able):
        error, _ = measure.accuracy(candidate, oracle)
        assert error < 1e-12, candidate.name


@pytest.mark.skipif(libraries.sentence_transformers() is None, reason="not installed (make setup)")
def test_cpu_autocast_rounds_the_log_sum_exp_of_sentence_transformers(monkeypatch):
    case = Case("info_nce_pairs", 256, D=128, dtype="bfloat16")
    problem = measure.make_problem(case, "cpu")
    oracle = measure.make_oracle(problem, "cpu", official=False)
    chosen = [c for c in candidates(case, problem.inputs) if c.name == "sentence-transformers"]

    def error() -> float:
        (loss, *_) = measure._results(chosen[0], problem)
        return relative_error(loss, oracle.exact[False][0])

    rounded, summed = error(), torch.logsumexp
    monkeypatch.setattr(torch, "logsumexp", lambda x, dim: summed(x.float(), dim))
    assert error() < measure.BASELINE_ERROR < rounded


@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("op", ["dual_info_nce", "himo_loss", "dual_info_nce_low_rank"])
def test_the_released_code_is_checked_against_its_own_semantics(op, preset):
    problem = measure.make_problem(Case(op, **SMALL, preset=preset, dtype="float64"), "cpu")
    oracle = measure.make_oracle(problem, "cpu", official=True)
    (candidate,) = (c for c in candidates(problem.case, problem.inputs) if c.name == "released")
    error, wrong = measure.accuracy(candidate, oracle)
    assert wrong is None and error < 1e-9


def test_a_baseline_with_a_nan_gradient_is_not_timed(unlimited):
    case = Case("pca_reconstruct", 128, spectrum="duplicates", modes=("fwd+bwd",))
    rows = list(cell(case, only=["released", "reference"]).rows())
    for row in rows:
        if row["backend"] == "released":
            assert row["status"] == "inaccurate" and "gradient of x: not finite" in row["reason"]
            assert "time_ms_p50" not in row
    assert any(row["backend"] == "reference" and row["time_ms_p50"] for row in rows)


@pytest.mark.slow
def test_a_backend_outside_its_budget_is_not_timed(unlimited, monkeypatch):
    # A new backend is measured without further registration; this one is off by 1e-4.
    table = OPERATORS["covariance"]
    reference = table.backends["reference"].kernels

    def off(*arguments):
        mean, moment = reference["fwd"](*arguments)
        return mean, moment * (1 + 1e-4)

    wrong = Backend({"fwd": off, "bwd": reference["bwd"]})
    monkeypatch.setattr(table, "backends", {"numpy": wrong, **table.backends})
    rows = [r for r in cell(Case("covariance", **SMALL)).rows() if r["backend"] == "numpy"]
    assert len(rows) == 2
    for row in rows:
        assert row["status"] == "inaccurate" and row["reason"].startswith("output 1: error 1.0")
        assert "time_ms_p50" not in row and row["auto"] == "yes"


@pytest.mark.slow
def test_a_backend_that_raises_is_a_row(unlimited, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no such instruction")

    broken = Backend({"fwd": fail, "bwd": fail})
    monkeypatch.setitem(OPERATORS["gram"].backends, "triton", broken)
    rows = [r for r in cell(Case("gram", **SMALL)).rows() if r["backend"] == "triton"]
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert rows[0]["reason"] == "RuntimeError: no such instruction"


def test_candidates_take_turns(monkeypatch):
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "AB"}
    monkeypatch.setattr(measure, "LONG_MS", 0.0)  # every call counts as long
    samples = measure.time_together(steps, "cpu", seconds=0.0)
    assert calls == ["A", "B"] * 3
    assert all(len(found[0].times_ms) == 3 for found in samples.values())


def rows_checked(case: Case) -> int:
    return measure.checked_rows(measure.make_problem(case, "cpu"), "cpu")


def test_large_cells_are_checked_on_leading_rows_with_the_same_ragged_tile(monkeypatch):
    monkeypatch.setitem(measure.CHECKED_ROWS, "cpu", 64)
    assert rows_checked(Case("gram", 128, D=8)) == 128
    assert rows_checked(Case("gram", 1024 + 37, D=8)) == 64 + 37
    for op in OPTIONS:
        problem = measure.make_problem(Case(op, 64 + 64 + 1 + 64, D=8), "cpu")
        oracle = measure.make_oracle(problem, "cpu", official=False)
        assert oracle.rows == 65
        (chosen,) = (c for c in candidates(problem.case, problem.inputs) if c.auto)
        assert measure.accuracy(chosen, oracle)[1] is None


@needs_proc
def test_the_peak_sees_memory_that_torch_does_not_count():
    # In a process without threads: a forked child would wait for threads it does not have.
    script = """
import ctypes, json
from benchmarks import memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def run():
    block = libc.malloc(ctypes.c_size_t(50 << 20))
    ctypes.memset(ctypes.c_void_p(block), 1, 50 << 20)
    libc.free(ctypes.c_void_p(block))
print(json.dumps(memory.in_child(lambda: memory.peak_cpu(lambda: None, run))))
print(json.dumps(memory.in_child(lambda: bytearray(1 << 50))))
print(json.dumps(memory.in_child(lambda: 1 / 0)))
"""
    peak, too_much, wrong = map(json.loads, run_python("-c", script).splitlines())
    assert 49 < peak["peak_mib"] < 51 and peak["time_ms"] > 0
    assert too_much == {"reason": "out of memory"}
    assert wrong == {"reason": "ZeroDivisionError: division by zero"}


@needs_proc
@pytest.mark.slow
def test_a_peak_does_not_depend_on_what_the_warm_up_allocated():
    # A compiled candidate is warmed up by a whole call, the others by a small one.
    script = """
import json
from benchmarks import measure, memory
from benchmarks.cases import Case
from benchmarks.registry import candidates
def peak(warm_up_n):
    memory.return_freed_blocks()
    large, small = (
        measure.make_problem(Case("info_nce_pairs", n, 64), "cpu") for n in (1024, warm_up_n)
    )
    (eager,) = (c for c in candidates(large.case, large.inputs) if c.name == "eager")
    steps = [measure.step(eager, problem, "fwd+bwd") for problem in (small, large)]
    return memory.peak_cpu(*steps)["peak_mib"]
print(json.dumps([memory.in_child(lambda: peak(n)) for n in (8, 1024)]))
"""
    small, whole = json.loads(run_python("-c", script))
    matrix = 1024**2 * 4 / memory.MIB
    assert 2 * matrix < whole < 6 * matrix and abs(small - whole) < 1


@needs_proc
@pytest.mark.slow
def test_what_an_inaccurate_candidate_takes_is_in_its_reason():
    script = """
import json
from benchmarks.cases import Case
from benchmarks.worker import Cell
case = Case("pca_reconstruct", 48, 64, spectrum="duplicates", modes=("fwd+bwd",), memory=True)
cell = Cell(case, "cpu", 0.0, {"float32": 1.0, "copy": 10.0}, compile=False, only=["released"])
print(json.dumps(list(cell.rows())))
"""
    (row,) = json.loads(run_python("-c", script))
    assert row["status"] == "inaccurate" and float(row["peak_mib"]) >= 0
    assert re.fullmatch(r"gradient of x: not finite; one call took [\d.e+]+ ms", row["reason"])
    assert not any(name.startswith("time_ms") for name in row)


def test_the_cost_model_of_the_losses():
    # performance: 8 N^2 D for one loss with its backward, 8 + 8 R / D more for the component.
    case = Case("info_nce", 100, D=64, share=0.25)
    flops = {op: OPERATIONS[op].flops for op in OPERATIONS}
    assert flops["info_nce"](case, 0, True) == 8 * 100**2 * 64
    assert flops["dual_info_nce"](case, 0, True) == 16 * 100**2 * 64
    assert flops["dual_info_nce_low_rank"](case, 16, True) == 10 * 100**2 * 64
    assert flops["info_nce"](case, 0, False) == 2 * 100**2 * 64
    # The sigmoid loss takes its gradients from the logits of the forward.
    assert flops["sigmoid_loss"](case, 0, True) == 6 * 100**2 * 64
    assert flops["sigmoid_loss"](case, 0, False) == 2 * 100**2 * 64


def test_every_operator_of_a_loss_or_moment_is_registered():
    covered = {
        "project_reconstruct": "pca_reconstruct",
        "pca": "pca_reconstruct",
        "info_nce_pairs": "info_nce",
    }
    missing = set(OPERATORS) - set(OPERATIONS) - set(covered)
    assert not missing
    assert set(OPERATIONS) <= set(OPERATORS)
    assert set(OPERATIONS) == set(OPTIONS)


def test_half_precision_baselines_run_under_autocast():
    problem = measure.make_problem(Case("info_nce", **SMALL, dtype="bfloat16"), "cpu")
    seen = []

    def call(inputs, case):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (inputs["image_features"].sum() + sum(x.sum() for x in inputs.values()),)

    baseline = Candidate("baseline", call, library=False)
    for candidate in (baseline, dataclasses.replace(baseline, library=True)):
        measure.step(candidate, problem, "fwd+bwd")()
    assert seen == [True, False]


def test_a_ceiling_is_measured_for_the_dtypes_that_are_asked_for():
    found = measure.ceilings("cpu", ["float32"])
    assert set(found) == {"float32", "copy"} and found["copy"] > 0
    # TFLOP/s of one or two cores, or the reason; never the time of a matmul that does not fit.
    assert isinstance(found["float32"], str) or 1e-4 < found["float32"] < 10


@pytest.mark.slow
def test_a_ceiling_that_takes_too_long_has_its_reason(unlimited, monkeypatch):
    monkeypatch.setattr(measure, "CEILING_SECONDS", 1e-6)
    reason = measure.ceilings("cpu", ["float32"])["float32"]
    assert re.fullmatch(r"a product of 256 takes \d+ ms, larger ones over 1e-06 s", reason)
    case = Case("gram", **SMALL, modes=("fwd",))
    rows = list(cell(case, ceilings={"float32": reason, "copy": 10.0}).rows())
    assert all(row["reason"] == f"ceiling not measured: {reason}" for row in timed(rows))
    assert timed(rows) and not any("fraction" in row or "ceiling_tflops" in row for row in rows)


def test_what_takes_too_long_in_a_child_is_left_out():
    begun = time.perf_counter()
    assert memory.in_child(lambda: time.sleep(60), 0.2) == {"reason": "left out: over 0.2 s"}
    assert memory.in_child(lambda: time.sleep(60), 5e-3) == {"reason": "left out: over 0.005 s"}
    assert time.perf_counter() - begun < 30
    assert memory.in_child(lambda: 1, 30) == 1


@pytest.mark.slow
def test_slow_baselines_are_left_out_and_the_library_is_timed():
    # In a fresh process, in which nothing has been computed before the children are forked.
    script = """
import json
from benchmarks.cases import Case
from benchmarks.worker import Cell
case = Case("info_nce", 24, 8, modes=("fwd",))
cell = Cell(case, "cpu", 0.0, {"float32": 1.0, "copy": 10.0}, compile=False, baseline_seconds=1e-3)
print(json.dumps(list(cell.rows())))
"""
    rows = json.loads(run_python("-c", script))
    by_name = {row["backend"]: row for row in rows}
    for name in ("open_clip", "linear_cross_entropy"):
        assert by_name[name]["status"] == "left out"
        assert by_name[name]["reason"].endswith("of 0.001 s for the baselines of a cell")
    assert by_name["reference"]["status"] == "ok" and by_name["reference"]["time_ms_min"]


def timed(rows):
    return [row for row in rows if row.get("time_ms_min")]
