"""Times HiMoLoss and its gradients eagerly and as CUDA graphs, and lists its kernels by time.

python -m benchmarks.head --n 128 --out build/gpu
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.run import positive
from himo_kernels.graphed import LARGEST_SIDE
from himo_kernels.info_nce.triton.tune import time_ms
from himo_kernels.nn import HiMoLoss
from himo_kernels.testing import power_law

FEATURES = 768
MOST_KERNELS = 40  # lines of the profile

Step = Callable[[], object]


def steps(loss: HiMoLoss, inputs: list[Tensor]) -> dict[str, Step]:
    """Returns the ways to compute the loss of these inputs and its gradients, by name."""

    def step(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = call(*inputs)
        return value, *torch.autograd.grad(value, inputs)

    found: dict[str, Step] = {"eager": lambda: step(loss)}
    image, text, scale = inputs
    if image.is_cuda and min(image.shape) <= LARGEST_SIDE:
        head = loss.make_graphed(image, text, scale)
        found["make_graphed"] = lambda: step(head)
        found["one graph"] = _captured(lambda: step(loss))
    return found


def _captured(step: Step) -> Step:
    # Forward and backward as one graph: the time of the device alone.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def kernels(step: Step, device: str) -> str:
    """Returns the kernels of one step, the slowest first; operators on a CPU."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    order = f"self_{device}_time_total" if device == "cpu" else "self_device_time_total"
    return recorded.key_averages().table(sort_by=order, row_limit=MOST_KERNELS)


def main(arguments: list[str] | None = None) -> int:
    """Prints times and kernels, and writes the times to head.json in --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--n", nargs="+", type=positive, default=[128], help="pairs; 128 by default")
    add("--preset", default="paper", help="of the loss; paper by default")
    add("--backend", default="triton", help="triton by default")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--repeats", type=positive, default=50)
    add("--out", type=Path, required=True, help="directory of head.json")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times: dict[str, dict[str, float]] = {}
    loss = HiMoLoss(options.preset, backend=options.backend)
    for n in options.n:
        drawn = {"dtype": getattr(torch, options.dtype), "device": device}
        inputs = [power_law(n, FEATURES, **drawn) for _ in range(2)]
        inputs = [x.requires_grad_() for x in (*inputs, torch.tensor(50.0, device=device))]
        found = steps(loss, inputs)
        times[str(n)] = {
            name: time_ms(step, torch.device(device), options.repeats)
            for name, step in found.items()
        }
        for name, took in times[str(n)].items():
            print(f"{n} x {FEATURES}, {options.dtype}, {name}: {took:.3f} ms", flush=True)
        print(kernels(found["eager"], device), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {"device": device, "preset": options.preset, "dtype": options.dtype}
    (options.out / "head.json").write_text(json.dumps(facts | {"times_ms": times}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
