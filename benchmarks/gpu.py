"""The first ten minutes on a GPU: kernels compiled, tested, checked, tuned and measured.

python -m benchmarks.gpu --out build/gpu --tar build/gpu.tar.gz

Each step has a time limit, writes its output to a file and ends no other. The last ones take the
time that is left. --dry-run runs the same steps on a CPU, on small inputs: what needs no GPU.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from benchmarks import steps
from benchmarks.steps import Step

FIRST_TESTS = (
    *("tests/covariance", "tests/normalize", "tests/test_graphed.py"),
    *(f"tests/pca/test_pca_{name}.py" for name in ("cuda", "triton", "moment")),
    *(f"tests/info_nce/test_info_nce_{name}.py" for name in ("cuda", "triton", "block")),
    *(f"tests/info_nce/test_info_nce_{name}_triton.py" for name in ("block", "pairs")),
    *(f"tests/sigmoid_loss/test_sigmoid_loss{name}.py" for name in ("", "_triton")),
)
PROCESSES = 8  # of the tests, which compile in parallel
TABLE = 20  # seconds of the last step
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
# An allocation of its own for every tensor, so that the sanitizer knows where each one ends.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def session(out: Path, minutes: float, dry: bool) -> list[list[Step]]:
    """Returns the steps in order; the steps of a group run in parallel."""
    python = (sys.executable, "-m")
    only_here = INTERPRETED if dry else {}

    def tests(name: str, seconds: int, *files: str) -> Step:
        options = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "--maxfail=80"]
        if importlib.util.find_spec("xdist") is not None and not dry:
            options += ["-n", str(PROCESSES)]
        options += [f"--junitxml={out / name}.xml", *files]
        return Step(name, (*python, "pytest", *options), seconds)

    def rows(name: str, seconds: int, *cells: str) -> Step:
        budget = ("--budget-minutes", f"{seconds / 60:.2f}", "--seconds", "0.3", "--no-compile")
        on = ("--device", "cpu" if dry else "cuda", "--out", str(out))
        if dry:
            budget = ("--seconds", "0.01", "--no-compile", "--no-memory", "--mode", "fwd+bwd")
            cells = (*cells[: cells.index("--n")], "--n", "64", "--backend", "auto", "reference")
        else:
            cells = (*cells, "--dtype", "bfloat16")
        return Step(name, (*python, "benchmarks.run", *on, *cells, *budget), seconds)

    def sanitizer(tool: str) -> Step:
        small = (*python, "benchmarks.small")
        if dry:
            return Step(tool, (*small, "--dtype", "float32"), 40, only_here)
        check = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        return Step(tool, (*check, *small), 40, SANITIZED)

    tune = ("--samples", "64", "--features", "32", "--tiles", "16x32x32:4:1") if dry else ()
    head = ("--n", "128", "1024")
    if dry:  # a CPU without bfloat16 instructions takes minutes for it
        head = ("--n", "16", "--backend", "reference", "--dtype", "float32")
    left = max(1.0, minutes - 8)
    whole = ("--all", "--device", "cuda", "--out", str(out), "--budget-minutes", f"{left:.1f}")
    found = [
        [
            Step("machine", (*python, "himo_kernels.info"), 20),
            Step("nvidia-smi", ("nvidia-smi",), 10),
        ],
        [
            Step("warm", (*python, "benchmarks.warm", *(("--first", "4") if dry else ())), 90),
            Step(
                "build", (sys.executable, "setup.py", "build_ext", "--inplace"), 300 if dry else 120
            ),
        ],
        [tests("tests", 140, *FIRST_TESTS)],
        [sanitizer("memcheck")] if dry else [sanitizer("memcheck"), sanitizer("initcheck")],
        [
            Step(
                "tune",
                (*python, "himo_kernels.info_nce.triton.tune", "--repeats", "5", *tune),
                45,
                only_here,
            )
        ],
        [rows("rows-128-1024", 70, *_cells("himo_loss pca_reconstruct dual_info_nce", 128, 1024))],
        [
            rows(
                *("rows-32768", 50, "--rank-share", "0.3334"),
                *_cells("dual_info_nce dual_info_nce_low_rank", 32768),
            )
        ],
        [Step("head", (*python, "benchmarks.head", *head, "--out", str(out)), 45, only_here)],
        [Step("table", (*python, "benchmarks.plot", str(out), "--markdown"), TABLE)],
    ]
    if not dry:
        rest = tests("more-tests", 90, "tests", *(f"--ignore={name}" for name in FIRST_TESTS))
        every = Step(
            *("rows-all", (*python, "benchmarks.run", *whole), 60 * round(left)),
            leaves=steps.GRACE + TABLE,
        )
        found += [[rest], [every], found[-1]]
    return found


def _cells(operators: str, *samples: int) -> list[str]:
    sizes = [str(n) for n in samples]
    return ["--op", *operators.split(), "--n", *sizes]


def main(arguments: list[str] | None = None) -> int:
    """Runs the session; returns 1 if a step failed, 2 without a GPU, 130 if interrupted."""
    parser = steps.parser("benchmarks.gpu", __doc__, minutes=9.5)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("make gpu: needs a CUDA device, and this torch sees none", file=sys.stderr)
        return 2
    found = session(options.out.resolve(), options.minutes, options.dry_run)
    return steps.main(found, options, parser)


if __name__ == "__main__":
    sys.exit(main())
