"""Checks HiMoLoss over ranks against one process, and how much of the exchange products hide.

python -m torch.distributed.run --nproc-per-node=2 -m benchmarks.exchange --device cuda

Each rank compares its share of the loss and its gradients with the values of one process on the
joined batch, for both strategies, with equal and unequal rows. On GPUs, rank 0 then profiles a step
with the ring: the share of the time of NCCL's kernels in which another kernel runs too.
"""

import argparse
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.run import positive
from himo_kernels.nn import HiMoLoss
from himo_kernels.testing import power_law, relative_error

FEATURES = 256
AGREE = 1e-4  # relative error in float32: the order of the sums differs
Interval = tuple[float, float]


def hidden(transfers: Iterable[Interval], products: Iterable[Interval]) -> float:
    """Returns the share of the time of the transfers in which a product runs; NaN without any."""
    spans, others = _merged(transfers), _merged(products)
    total = sum(end - start for start, end in spans)
    both = sum(
        max(0.0, min(end, until) - max(start, begin))
        for start, end in spans
        for begin, until in others
    )
    return both / total if total else float("nan")


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    # Sorted, and without overlap.
    spans: list[Interval] = []
    for start, end in sorted(intervals):
        if spans and start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], end)
        else:
            spans.append((start, end))
    return spans


def _inputs(rows: int, device: torch.device) -> list[Tensor]:
    # The same on every rank.
    generator = torch.Generator().manual_seed(rows)
    features = [power_law(rows, FEATURES, generator=generator).to(device) for _ in range(2)]
    return [*features, torch.tensor(20.0, device=device)]


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def check(
    counts: list[int],
    strategy: str,
    preset: str,
    device: torch.device,
    alone: dist.ProcessGroup,
) -> float:
    """Returns the largest relative error of this rank's gradients and of the mean of the shares."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = [x.requires_grad_() for x in _inputs(sum(counts), device)]
    expected = HiMoLoss(preset, pca_scope="global", group=alone)(*whole)
    exact = _gradients(expected, whole)
    mine = [x.split(counts)[rank] if x.dim() else x for x in whole]
    mine = [x.detach().clone().requires_grad_() for x in mine]
    share = HiMoLoss(preset, pca_scope="global", strategy=strategy)(*mine)
    found = [share.detach(), *_gradients(share, mine)]
    # Of the mean over ranks of the shares.
    for value in (found[0], found[-1]):
        dist.all_reduce(value)
        value /= size
    rows = [size * grad.split(counts)[rank] for grad in exact[:-1]]
    pairs = zip(found, [expected.detach(), *rows, exact[-1]], strict=True)
    return max(relative_error(actual, true) for actual, true in pairs)


def overlap(rows: int, backend: str, device: torch.device) -> tuple[float, float]:
    """Returns the share of the ring's transfers that products hide, and their milliseconds."""
    loss = HiMoLoss(strategy="ring", check_ranks=False, backend=backend)
    inputs = [x.requires_grad_() for x in _inputs(rows, device)]
    for _ in range(3):
        _gradients(loss(*inputs), inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        _gradients(loss(*inputs), inputs)
        torch.cuda.synchronize()
    transfers: list[Interval] = []
    products: list[Interval] = []
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA:
            kind = transfers if "nccl" in event.name.lower() else products
            kind.append((event.time_range.start, event.time_range.end))
    total = sum(end - start for start, end in _merged(transfers))
    return hidden(transfers, products), total / 1e3


def main(arguments: list[str] | None = None) -> int:
    """Runs on every rank; returns 1 if one of its results differs from one process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--n", type=positive, default=128, help="rows of a rank in the checks")
    add(
        "--profiled",
        nargs="*",
        type=positive,
        default=[1024, 4096],
        help="rows of a rank, profiled",
    )
    add("--backend", default="auto", help="of the profiled loss")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if options.device == "cpu" else "nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([one]) for one in range(size)][rank]  # every rank makes every group
    uneven = [options.n + 8 * one for one in range(size)]
    status = 0
    for counts in ([options.n] * size, uneven):
        for strategy in ("gather", "ring"):
            for preset in ("paper", "official"):
                error = check(counts, strategy, preset, device, alone)
                agrees = error <= AGREE
                status |= not agrees
                if rank == 0 or not agrees:
                    print(f"rank {rank}: {counts} {strategy} {preset}: {error:.1e}", flush=True)
    for rows in options.profiled if options.device == "cuda" else ():
        share, milliseconds = overlap(rows, options.backend, device)
        if rank == 0:
            print(
                f"ring of {size}, {rows} x {FEATURES} each: {milliseconds:.3f} ms of NCCL's "
                f"kernels, {share:.0%} in parallel with another kernel",
                flush=True,
            )
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
