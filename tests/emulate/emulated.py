"""CUDA C++ built for the host with sanitizers, through csrc/emulate/cuda_on_host.h."""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CSRC = Path(__file__).parents[2] / "csrc"
SOLVER = (CSRC / "emulate/solve.cpp", CSRC / "cuda/symmetric_eigen.cu")
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"


# Removed when this process ends.
_holder = tempfile.TemporaryDirectory(prefix="himo-emulate-")
FOLDER = Path(_holder.name)


@functools.cache
def build(sources: tuple[Path, ...], sanitizer: str, csrc: Path = CSRC) -> Path:
    """Returns the program of these sources. csrc is the folder that includes start from."""
    program = FOLDER / f"{sources[0].stem}-{len(list(FOLDER.iterdir()))}"
    # A .cu file is C++ here.
    command = [*COMPILER.split(), "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    command += [*SANITIZERS[sanitizer], f"-I{csrc}", "-x", "c++", *map(str, sources)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


@functools.cache
def why_not() -> str | None:
    """Returns why no program with sanitizers can be built and run here, or None."""
    source = FOLDER / "nothing.cpp"
    source.write_text("int main() {}")
    try:
        for sanitizer in SANITIZERS:
            ended = subprocess.run([build((source,), sanitizer)], capture_output=True, text=True)
            if ended.returncode:
                return f"the {sanitizer} sanitizer does not run here: {ended.stderr.strip()[:200]}"
    except (OSError, AssertionError) as error:
        return f"{COMPILER} builds no program with sanitizers: {str(error)[:200]}"
    return None


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs a program, which ends at the first race, as each takes seconds to print."""
    command = [program, *map(str, arguments)]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)


class Solution(NamedTuple):
    """What the solver's kernel wrote; NaN or -1 where it wrote nothing."""

    eigenvalues: Tensor  # [P, n] float64
    vectors: Tensor  # [P, n, n] float64
    rank: Tensor  # [P] int64
    certified: Tensor  # [P] int32


def solve(
    program: Path,
    matrices: Tensor,  # [P, n, n] float64
    *,
    threshold: float | None = None,
    shifts: Tensor | None = None,  # [P] float64
    floor: tuple[float, float] = (0.0, 0.0),  # relative, absolute
    seed: int = 1,
    side: int | None = None,  # the kernel is told this n
) -> Solution:
    """Runs the kernel on the host; raises AssertionError with what a sanitizer reports."""
    problems, n, _ = matrices.shape
    given, taken = FOLDER / "matrices", FOLDER / "solution"
    shifts = torch.zeros(problems) if shifts is None else shifts
    with given.open("wb") as file:
        np.array([n if side is None else side, problems, threshold is not None], np.int64).tofile(
            file
        )
        np.array([threshold or 0.0, *floor], np.float64).tofile(file)
        shifts.double().numpy().tofile(file)
        matrices.double().contiguous().numpy().tofile(file)
    solved = run(program, given, taken, seed)
    assert solved.returncode == 0, solved.stderr
    with taken.open("rb") as file:
        values, vectors, rank, certified = (
            torch.from_numpy(np.fromfile(file, dtype, count))
            for dtype, count in (
                (np.float64, problems * n),
                (np.float64, problems * n * n),
                (np.int64, problems),
                (np.int32, problems),
            )
        )
    return Solution(values.view(problems, n), vectors.view(problems, n, n), rank, certified)
