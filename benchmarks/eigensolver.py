"""Times both eigensolvers of the `cpu` backend: the rows behind its choice by size and processor.

python -m benchmarks.eigensolver --out benchmarks/results/cpu-avx2

Matrices are float64 moments of a power law. LAPACK's time in float32, through torch.linalg.eigh, is
what a decomposition in mixed precision would pay before its correction in float64.
ATEN_CPU_CAPABILITY=avx2 limits our solver to AVX2, MKL_ENABLE_INSTRUCTIONS=AVX2 limits LAPACK.
"""

import argparse
import csv
import io
import time
from pathlib import Path

import torch

from benchmarks.rows import facts, write_whole
from himo_kernels import extension

SIDES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SECONDS = 1.0  # for each size


def milliseconds(n: int, seconds: float = SECONDS) -> dict[str, float]:
    """Returns the shortest time of each solver for an n x n matrix, measured in rounds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * n, n, dtype=torch.float64, generator=generator)
    rows *= torch.arange(1, n + 1).double().rsqrt()
    moment = (rows.mT @ rows).unsqueeze(0)
    rounded, solve = moment.float(), extension.load().solve_symmetric
    solvers = {
        "himo": lambda: solve(moment, "himo"),
        "lapack": lambda: solve(moment, "lapack"),
        "lapack_float32": lambda: torch.linalg.eigh(rounded),
    }
    best = dict.fromkeys(solvers, float("inf"))
    end, round_ = time.perf_counter() + seconds, 0
    while round_ < 3 or time.perf_counter() < end:
        for name, run in solvers.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
        round_ += 1
    return best


def main(arguments: list[str] | None = None) -> int:
    """Writes eigensolver.csv."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of eigensolver.csv")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each size")
    parser.add_argument("--n", type=int, nargs="+", default=SIDES)
    options = parser.parse_args(arguments)
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        about = facts("cpu", threads)
        for n in options.n:
            best = {
                f"{name}_ms": f"{ms:.3g}" for name, ms in milliseconds(n, options.seconds).items()
            }
            chosen = extension.load().eigensolver(n)
            rows.append({"n": str(n), **best, "chosen": chosen, **about})
            print(threads, n, *best.values(), chosen, flush=True)
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "eigensolver.csv", text.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
