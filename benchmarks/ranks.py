"""Times the whole head over several processes, with the released code, and writes the rows.

python -m benchmarks.ranks --ranks 2 --n 128 512 2048 --out benchmarks/results/cpu

Single-threaded ranks on this machine, connected by gloo: this measures computation, not a network.
N is the rows per rank. Ranks begin a step together, and it ends with the slowest rank. Candidates
are interleaved. On GPUs there is one process per device; --ranks is torchrun's --nproc_per_node.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from benchmarks import rows as table
from benchmarks.baselines import released
from benchmarks.rows import BenchmarkError, Row, number
from benchmarks.run import progress
from himo_kernels.distributed.exchange import STRATEGIES
from himo_kernels.info_nce.block import BLOCK
from himo_kernels.nn import HiMoLoss
from himo_kernels.testing import power_law, relative_error

OP = "himo_loss_over_ranks"
FEATURES = 768
# The semantics of a row. Global: PCA of the joined batch, exact gradients. Local: as released, PCA
# of a rank's rows, constant keys, label smoothing 0.1.
CONFIGS = ("global", "local")
FEWEST, MOST = 5, 40  # rounds
AGREE = 1e-3  # relative error of losses and gradients that differ only in the order of sums

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def candidates(config: str, x: Tensor, strategy: str = "gather") -> dict[str, Loss]:
    """The timed losses, by the name in their row."""
    preset, scope = ("paper", "global") if config == "global" else ("official", "local")
    names = [name for name in BLOCK.backends if BLOCK.why_not(name, x) is None]
    found: dict[str, Loss] = {
        name: HiMoLoss(preset, pca_scope=scope, backend=name, strategy=strategy) for name in names
    }
    if config == "local":
        found["released"] = lambda *inputs: sum(released.himo_loss(*inputs))
        found["open_clip, gather_with_grad"] = _with_gradient
    return found


def _with_gradient(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The released loss with gradients to keys, as in open_clip with local_loss."""
    image, text = image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    component = released.cumulative_ratio_pca(text, 0.85)
    gathered = [torch.cat(all_gather(x)) for x in (image, text, component)]
    losses = released.dual_loss(image, text, component, scale, tuple(gathered))
    return losses[0] + losses[1]


def worker(options: argparse.Namespace) -> None:
    """What each rank runs; rank 0 writes the times and errors of every cell as json."""
    device = options.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    found = []
    first = dist.get_rank() == 0
    with progress(len(CONFIGS) * len(options.n)) if first else nullcontext() as bar:
        for config, n in itertools.product(CONFIGS, options.n):
            for name, result in _cell(config, n, options).items():
                found.append({"backend": name, "N": n, "config": config, **result})
            if bar is not None:
                bar.set_description_str(f"{config} {n}")
                bar.update()
    if first:
        options.results.write_text(json.dumps(found))
    dist.destroy_process_group()


def _cell(config: str, n: int, options: argparse.Namespace) -> dict[str, dict]:
    device = options.device
    generator = torch.Generator().manual_seed(dist.get_rank())
    image, text = (power_law(n, FEATURES, generator=generator).to(device) for _ in range(2))
    inputs = [x.requires_grad_() for x in (image, text, torch.tensor(50.0, device=device))]
    losses = candidates(config, image, options.strategy)

    def step(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    expected = step(losses["reference"])
    results: dict[str, dict] = {}
    for name, loss in losses.items():
        # open_clip's gradients of the keys differ, so only its value is compared.
        found, exact = step(loss), expected
        if name.startswith("open_clip"):
            found, exact = found[:1], expected[:1]
        error = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
        results[name] = {"error": error, "times_ms": []}
    end = time.monotonic() + options.seconds * len(losses)
    for rounds in range(1, MOST + 1):
        for name, loss in losses.items():
            results[name]["times_ms"].append(_slowest_ms(lambda loss=loss: step(loss), device))
        # Rank 0 decides for all, since clocks differ.
        stop = torch.tensor(float(rounds >= FEWEST and time.monotonic() > end), device=device)
        dist.broadcast(stop, 0)
        if stop:
            break
    return results


def _slowest_ms(run: Callable[[], object], device: str) -> float:
    dist.barrier()
    before = time.perf_counter_ns()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor((time.perf_counter_ns() - before) / 1e6, device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def rows(found: list[dict], options: argparse.Namespace) -> list[Row]:
    """The rows of the ranks' results; an inaccurate candidate has no time."""
    facts = table.facts(options.device, threads=1)
    auto = BLOCK.preferred(torch.empty(1, FEATURES, device=options.device))
    made = []
    for result in found:
        row = facts | {
            "op": OP,
            "backend": result["backend"],
            "auto": "yes" if result["backend"] == auto else "",
            "mode": "fwd+bwd",
            "B": "1",
            "N": str(result["N"]),
            "D": str(FEATURES),
            "dtype": "float32",
            "config": f"ranks={options.ranks} {result['config']}"
            + (" ring" if options.strategy == "ring" else ""),
            "timing": "wall",
            "error": number(result["error"]),
            "load": options.load,
        }
        if not result["error"] <= AGREE:
            reason = f"{result['error']:.2e} from the reference, above {AGREE:g}"
            made.append(row | {"status": "inaccurate", "reason": reason})
            continue
        times = sorted(result["times_ms"])
        quantiles = {share: times[round(share * (len(times) - 1))] for share in (0.2, 0.5, 0.8)}
        row |= {f"time_ms_p{round(100 * share)}": number(t) for share, t in quantiles.items()}
        made.append(row | {"time_ms_min": number(times[0]), "repeats": str(len(times))})
        made[-1]["status"] = "ok"
    return made


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, 2 for a user error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--ranks", type=_at_least_two, default=2, help="processes; 2 by default")
    add("--n", nargs="+", type=_positive, default=[128, 512, 2048], help="rows of each rank")
    add("--strategy", choices=tuple(STRATEGIES), default="gather", help="of the exchange")
    add("--seconds", type=float, default=2.0, help="of timing per candidate; 2 by default")
    add("--out", type=Path, required=True, help=f"directory of {OP}.csv")
    add("--results", type=Path, help=argparse.SUPPRESS)  # passed to a worker
    options = parser.parse_args(arguments)
    if options.results:
        worker(options)
        return 0
    try:
        table.read(options.out / f"{OP}.csv")  # fails on a file of another format before measuring
        options.load = f"{os.getloadavg()[0]:.2f}"
        measured = _launch(options)
        options.out.mkdir(parents=True, exist_ok=True)
        made = rows(measured, options)
        table.merge(options.out / f"{OP}.csv", made)
    except BenchmarkError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    for row in made:
        print(f"{row['config']} {row['N']:>6} {row['backend']:<28} {row.get('time_ms_min', '')}")
    return int(any(row["status"] != "ok" and row["backend"] in table.LIBRARY for row in made))


def _launch(options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        run = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"]
        run += ["--rdzv-endpoint=127.0.0.1:0", f"--nproc-per-node={options.ranks}"]
        run += [
            "-m",
            "--",
            "benchmarks.ranks",
            "--device",
            options.device,
            "--n",
            *map(str, options.n),
        ]
        run += ["--strategy", options.strategy, "--seconds", str(options.seconds)]
        run += ["--out", folder, "--results", str(results)]
        environment = {
            "GLOO_SOCKET_IFNAME": "lo",  # for hosts whose own name does not resolve
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(run, cwd=table.ROOT, env=environment)
        if done.returncode or not results.exists():
            raise BenchmarkError(f"the ranks ended with status {done.returncode}; see above")
        return json.loads(results.read_text())


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected at least 2, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
