"""The host's emulation of CUDA finds faults: planted ones, and the solver without a barrier."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
import torch
from emulated import CSRC

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

FAULTS = ("none", "no barrier", "shuffle as a fence", "two blocks on one output")
FAULTS += ("past the end of shared memory", "past the end of global memory")
FAULTS += ("shared memory that nobody wrote", "a barrier that some never reach")


def run(fault: str, sanitizer: str, seed: int) -> subprocess.CompletedProcess:
    program = emulated.build((Path(__file__).with_name("planted_faults.cpp"),), sanitizer)
    return emulated.run(program, FAULTS.index(fault), seed)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", emulated.SANITIZERS)
def test_without_a_fault_nothing_is_reported(sanitizer):
    for seed in (1, 2):
        clean = run("none", sanitizer, seed)
        assert clean.returncode == 0, clean.stderr
        assert clean.stderr == ""


# Whatever the order in which the threads run.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("fault", "sanitizer", "report"),
    [
        ("no barrier", "thread", "data race"),
        ("shuffle as a fence", "thread", "data race"),
        ("two blocks on one output", "thread", "data race"),
        ("past the end of shared memory", "address", "use-after-poison"),
        ("past the end of global memory", "address", "heap-buffer-overflow"),
        ("shared memory that nobody wrote", "address", "wrong sum of row 0"),
        ("a barrier that some never reach", "address", "deadlock"),
    ],
)
def test_a_planted_fault_is_found(fault, sanitizer, report, seed):
    found = run(fault, sanitizer, seed)
    assert found.returncode != 0
    assert report in found.stderr


BARRIER = "__syncthreads();"
SOURCES = sorted((CSRC / "cuda").glob("*.cu*"))
BARRIERS = [
    (path.name, index) for path in SOURCES for index in range(path.read_text().count(BARRIER))
]


@functools.cache
def clustered() -> torch.Tensor:  # [2, 20, 20]: Gram-Schmidt runs, and both outputs are needed
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 20, dtype=torch.float64, generator=generator)
    x[:, :, 12:] = x[:, :, :8]
    return x.mT @ x


def without_barrier(name: str, index: int, folder: Path) -> Path:
    """Returns csrc with one barrier less. Only the smallest kernel is kept, to compile faster."""
    for part in ("cuda", "emulate"):
        shutil.copytree(CSRC / part, folder / part)
    source = folder / "cuda" / name
    pieces = source.read_text().split(BARRIER)
    source.write_text(BARRIER.join(pieces[: index + 1]) + ";" + BARRIER.join(pieces[index + 1 :]))
    launcher = folder / "cuda/symmetric_eigen.cu"
    launcher.write_text(re.sub(r"start<(64|128)>", "start<32>", launcher.read_text()))
    return folder


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "index"), BARRIERS)
def test_every_barrier_of_the_solver_is_needed(name, index, tmp_path):
    csrc = without_barrier(name, index, tmp_path / "csrc")
    sources = tuple(csrc / path.relative_to(CSRC) for path in emulated.SOLVER)
    program = emulated.build(sources, "thread", csrc)
    with pytest.raises(AssertionError, match="data race"):
        emulated.solve(program, clustered())
