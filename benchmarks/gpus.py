"""A session on two and more GPUs: the exchange checked over NCCL, profiled, and timed by ranks.

python -m benchmarks.gpus --out build/gpus

For 2, 4, ... ranks up to all GPUs: losses and gradients of both strategies against one process, the
share of the ring's transfers that products hide, and rows of the whole head. Not yet run on
hardware. --dry-run runs the same steps over gloo, with two processes on a CPU.
"""

import sys
from pathlib import Path

import torch

from benchmarks import steps
from benchmarks.steps import Step

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # for hosts whose own name does not resolve


def counts(devices: int) -> list[int]:
    """Returns the numbers of ranks: powers of two, and all GPUs."""
    powers = [2**power for power in range(1, devices.bit_length()) if 2**power < devices]
    return [*powers, devices]


def session(out: Path, devices: int, dry: bool) -> list[list[Step]]:
    """Returns the steps in order."""
    python = (sys.executable, "-m")
    on = ("--device", "cpu" if dry else "cuda")
    run = (*python, "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    found = [
        [Step("machine", (*python, "himo_kernels.info"), 20)],
        [Step("topology", ("nvidia-smi", "topo", "-m"), 10)],
    ]
    for ranks in counts(devices):
        check = ("-m", "--", "benchmarks.exchange", *on, "--n", "24" if dry else "128")
        command = (*run, f"--nproc-per-node={ranks}", *check)
        found.append([Step(f"exchange-{ranks}", command, 120, LOOPBACK)])
    for ranks in counts(devices):
        for strategy in ("gather", "ring"):
            cells = ("--n", "16", "--seconds", "0.01") if dry else ("--n", "128", "1024", "4096")
            options = (*on, "--ranks", str(ranks), "--strategy", strategy, "--out", str(out))
            command = (*python, "benchmarks.ranks", *options, *cells)
            found.append([Step(f"rows-{ranks}-{strategy}", command, 120, LOOPBACK)])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the session; returns 1 if a step failed, 2 without two GPUs, 130 if interrupted."""
    parser = steps.parser("benchmarks.gpus", __doc__, minutes=20)
    options = parser.parse_args(arguments)
    devices = 2 if options.dry_run else torch.cuda.device_count()
    if devices < 2:
        print(f"make gpus: needs two CUDA devices, and this torch sees {devices}", file=sys.stderr)
        return 2
    return steps.main(session(options.out.resolve(), devices, options.dry_run), options, parser)


if __name__ == "__main__":
    sys.exit(main())
