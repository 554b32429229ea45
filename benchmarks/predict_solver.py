"""Predicts the time of csrc/cuda/symmetric_eigen.cu on an H200 from its machine code.

python -m benchmarks.predict_solver

Needs nvcc and cuobjdump, and no GPU. Prints microseconds of each step for a matrix without clusters
of eigenvalues, all vectors computed. himo_kernels/sass.py has the model and its errors.
"""

import math
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from himo_kernels import sass
from himo_kernels.predict import CLOCK_GHZ

ROOT = Path(__file__).parents[1]
SIDES = (32, 64, 128)  # the kernel is compiled for these
WARPS, THREADS = 16, 512  # of its block, csrc/cuda/device.cuh
LANES, RESCALE = 32, 16  # columns of a phase; rows of T between rescalings, csrc/cuda/bisection.cuh
TARGET_US = 250  # at n = 128

Loop = list[sass.Instruction]


def cuobjdump() -> str:
    """Returns the disassembler: on the path, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)


def compiled() -> dict[int, list[sass.Instruction]]:
    """Returns the instructions of the kernel for each side, compiled for sm_90a."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "solver.cubin"))
        target = "-gencode=arch=compute_90a,code=sm_90a"
        command = ["nvcc", "-cubin", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", target]
        subprocess.run([*command, f"{ROOT}/csrc/cuda/symmetric_eigen.cu", "-o", cubin], check=True)
        listing = subprocess.run(
            [cuobjdump(), "-sass", cubin], check=True, capture_output=True, text=True
        ).stdout
    found = sass.kernels(listing)
    return {side: code for side in SIDES for name, code in found.items() if f"ILi{side}E" in name}


def inner_loops(code: list[sass.Instruction]) -> list[Loop]:
    """Returns one iteration of each loop without a loop inside, in the order of the code."""
    loops = sass.loops(code)
    inner = [
        (a, b)
        for a, b in loops
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)
    ]
    return [sass.body(code, loop) for loop in inner]


def steps_of(loops: list[Loop]) -> dict[str, list[Loop]]:
    """Sorts the loops by step, recognised by their instructions."""
    steps: dict[str, list[Loop]] = {}
    for loop in loops:
        has = Counter(i.family for i in loop)
        if has["BAR"] and has["MUFU"] >= 2:
            step = "tridiagonal form"
        elif has["DFMA"] and has["STG"] and has["MUFU"]:
            step = "elimination"
        elif has["DFMA"] and has["LDG"] and has["STS"]:
            step = "substitution" if has["DMUL"] else "elimination, again"
        elif has["SHFL"] and has["MUFU"] and has["STS"]:
            step = "lengths"
        elif has["DFMA"] and has["SHFL"] and not has["STS"]:
            step = "reflectors"
        elif has["DFMA"] and has["LDS"] and not any(has[f] for f in ("SHFL", "STS", "DSETP")):
            step = "bisection" if has["DADD"] else "Newton-Schulz"
        else:
            continue
        steps.setdefault(step, []).append(loop)
    return steps


def count(loop: Loop, family: str) -> int:
    """Returns how many instructions of a family a loop has."""
    return sum(i.family == family for i in loop)


def cost(loop: Loop, warps: int = WARPS) -> int:
    """Returns the cycles of an iteration of a loop that all warps of the block run."""
    return max(sass.latency(loop), sass.issue(loop, warps))


def per_reflector(loops: list[Loop], side: int, phase: int) -> float:
    """Returns the cycles of a reflector of a phase: `phase` times 32 elements of it are 0.

    The loops of a phase, unrolled or not, are those with its number of multiply-adds.
    """
    parts = THREADS // side  # threads of a vector
    elements = (side - LANES * phase) // parts
    exchanges = 2 * int(math.log2(parts))  # of a reflector
    fitting = [
        cost(loop) * exchanges / count(loop, "SHFL")
        for loop in loops
        if count(loop, "DFMA") * exchanges == 2 * elements * count(loop, "SHFL")
    ]
    if not fitting:
        raise ValueError(f"predict_solver: no loop for phase {phase} of side {side}")
    return min(fitting)


def microseconds(code: list[sass.Instruction], side: int, n: int) -> dict[str, float]:
    """Returns the predicted time of each step for a matrix of side n."""
    steps = steps_of(inner_loops(code))
    rows, columns, points = side // WARPS, side // LANES, THREADS // side
    each = (2 + 52 - math.log2(THREADS + 1)) / math.log2(points + 1)
    phases = [max(0, min(LANES, n - LANES * phase)) for phase in range(columns)]

    vector_warps = side // LANES  # a thread has a vector
    gram, *_, apply = steps["Newton-Schulz"]
    panels = math.ceil(n / LANES)
    substitute, again = steps["substitution"][0], steps["elimination, again"][0]
    sturm = steps["bisection"][-1]
    cycles = {
        "tridiagonal form": sum(
            trips * cost(loop)
            for trips, loop in zip(phases, steps["tridiagonal form"], strict=False)
        ),
        "bisection": (1 + math.ceil(each)) * math.ceil(n / RESCALE) * cost(sturm),
        "inverse iteration": (n - 1) * cost(steps["elimination"][0], vector_warps)
        + (n - 1) * cost(again, vector_warps) / max(1, count(again, "DFMA"))
        + 2 * (n - 1) * cost(substitute, vector_warps) / max(1, count(substitute, "DFMA") / 2)
        + 2 * rows * cost(steps["lengths"][0]) / count(steps["lengths"][0], "MUFU"),
        "Newton-Schulz": panels
        * (
            n * cost(gram) / (count(gram, "DFMA") / rows)
            + LANES * cost(apply) / (count(apply, "DFMA") / (rows * columns))
        ),
        "reflectors": sum(
            trips * per_reflector(steps["reflectors"], side, phase)
            for phase, trips in enumerate(phases)
        ),
    }
    return {step: value / (1e3 * CLOCK_GHZ) for step, value in cycles.items()}


def main() -> int:
    """Prints the table; returns 1 if n = 128 is predicted to miss its target."""
    if shutil.which("nvcc") is None:
        print("predict_solver: needs nvcc", file=sys.stderr)
        return 2
    code = compiled()
    total = 0.0
    for side in SIDES:
        steps = microseconds(code[side], side, side)
        total = sum(steps.values())
        parts = ", ".join(f"{step} {value:.0f}" for step, value in steps.items())
        print(f"n = {side}: {total:.0f} us predicted: {parts}")
    print(f"target at n = {SIDES[-1]}: {TARGET_US} us")
    return int(total > TARGET_US)


if __name__ == "__main__":
    sys.exit(main())
