"""Measures this machine and writes one HTML page: speed, memory, accuracy and loss curves.

python -m benchmarks.report --out report                         about five minutes
python -m benchmarks.report --out report --baseline report       compares with the previous report
"""

import argparse
import itertools
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import cases as grid
from benchmarks import compare, page, plot, run
from benchmarks import rows as table
from benchmarks.cases import Case
from benchmarks.registry import candidates, make_inputs
from benchmarks.rows import BenchmarkError, Row

OPS = ("himo_loss", "dual_info_nce", "pca_reconstruct")
SIZES = (128, 1024, 4096)
HALF_PRECISION = ("avx512_bf16", "amx_bf16")  # instructions that multiply bfloat16
LAST_START = 0.8  # no cell starts after this fraction of --minutes
# On a CPU, seconds for all baselines of a cell, per minute of --minutes. By default this is 6 s,
# too short to compile many of them.
BASELINE_SECONDS = 1.2
SECONDS = 0.3  # of timing per candidate
CURVE = Case("himo_loss", N=256, D=128)
CURVE_STEPS, CURVE_RATE = 100, 0.03


def cpu_dtypes() -> tuple[str, ...]:
    """Returns float32, and bfloat16 if the processor multiplies it."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return grid.DTYPES[: 1 + any(known.get(name) for name in HALF_PRECISION)]


def instructions() -> str:
    """Returns the vector instructions that torch uses, and AMX if the processor has it."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.backends.cpu.get_cpu_capability() + (" and AMX" if known.get("amx_bf16") else "")


def cells(ops: list[str], sizes: list[int], width: int, dtypes: tuple[str, ...]) -> list[Case]:
    """Returns the cells by size, so that only the largest are left out when time runs out."""
    modes = ("fwd+bwd",)
    return [
        Case(op, n, width, dtype=dtype, modes=modes, memory=True)
        for n, dtype, op in itertools.product(sorted(sizes), dtypes, ops)
        if dtype == "float32" or op != "pca_reconstruct"  # HiDe is float64 inside
    ]


def curves(device: str, case: Case = CURVE, steps: int = CURVE_STEPS) -> dict[str, list[float]]:
    """Returns the losses while SGD updates the features: the library's, and a plain formula's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for small products, waking more threads costs more than it saves
    try:
        return _curves(device, case, steps)
    finally:
        torch.set_num_threads(threads)


def _curves(device: str, case: Case, steps: int) -> dict[str, list[float]]:
    found = {}
    for candidate in candidates(case, make_inputs(case, device)):
        if candidate.name not in ("auto", "eager"):
            continue
        inputs = make_inputs(case, device)
        # Pair each image with the caption of another, so that there is something to learn.
        inputs["image_features"] = inputs["image_features"].roll(1, 0)
        features = [inputs[name].requires_grad_() for name in ("image_features", "text_features")]
        optimizer = torch.optim.SGD(features, lr=CURVE_RATE)
        losses = []
        for _ in range(steps):
            (loss,) = candidate.call(inputs, case)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found[candidate.name] = losses
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user error."""
    options = _parser().parse_args(arguments)
    try:
        return report(options)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; finished cells are written", file=sys.stderr)
        return 130


def report(options: argparse.Namespace) -> int:
    """Measures, writes rows and page; returns 1 if --fail-on-regression finds one, else 0."""
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: this torch sees no CUDA device")
    before = plot.read_folder(options.baseline) if options.baseline else []
    cases = cells(
        options.op, options.n, options.d, cpu_dtypes() if on_cpu else ("float32", "bfloat16")
    )
    settings = argparse.Namespace(
        device=options.device,
        out=options.out,
        threads=options.threads or torch.get_num_threads(),
        seconds=SECONDS,
        baseline_seconds=BASELINE_SECONDS * options.minutes,
        once=False,
        budget_minutes=LAST_START * options.minutes,
        no_compile=not on_cpu and options.minutes < 10,  # only a CPU has time limits
        no_memory=False,
        backend=[],
    )
    load = os.getloadavg()[0]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "log.txt").open("w") as log:
            rows = run.measure(cases, settings, log)
    except OSError as error:
        raise BenchmarkError(f"--out {options.out}: {error.strerror}") from error
    # A measured row lacks the columns it does not need; a row read from a file has all.
    rows = [dict.fromkeys(table.COLUMNS, "") | row for row in rows]
    facts = table.facts(options.device, settings.threads)
    same = [row for row in before if all(row[n] == facts[n] for n in ("device", "threads"))]
    changes = compare.changes(same, rows)
    written = options.out / "report.html"
    table.write_whole(
        written,
        page.render(
            rows,
            [case for case in cases if not _measured(case, rows)],
            curves(options.device),
            facts | {"instructions": instructions() if on_cpu else "", "load": f"{load:.2f}"},
            options.baseline
            and page.Comparison(options.baseline.resolve().name, changes, bool(same)),
            datetime.now(UTC),
        ),
    )
    slower = [change for change in changes if change.is_regression]
    for change in slower:
        run.warn(page.sentence(change))
    if bad := run.inaccurate(rows):
        run.warn(f"{len(bad)} rows of the library fail their accuracy check; see {options.out}")
    print(f"the report: {written}")
    return 1 if options.fail_on_regression and (slower or bad) else 0


def _measured(case: Case, rows: list[Row]) -> bool:
    cell = (case.op, str(case.N), case.dtype)
    return any((row["op"], row["N"], row["dtype"]) == cell for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of report.html, csv files and log.txt")
    add("--baseline", type=Path, metavar="DIR", help="an earlier run to compare with")
    add("--fail-on-regression", action="store_true", help="status 1 where a cell became slower")
    add("--minutes", type=_minutes, default=5.0, help="of measuring; default 5")
    add("--threads", type=run.positive, help="of the CPU; torch's own number by default")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--op", nargs="+", choices=tuple(grid.OPTIONS), default=OPS, metavar="OP")
    add("--n", nargs="+", type=run.positive, default=SIZES, help="samples; 128 1024 4096")
    add("--d", type=run.positive, default=768, help="features; 768 by default")
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value <= 24 * 60:
        raise argparse.ArgumentTypeError(f"expected above 0 and at most a day, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
