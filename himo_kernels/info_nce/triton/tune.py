"""Times tiles for the table in tiles.py: forward and backward of one loss on the available GPU.

python -m himo_kernels.info_nce.triton.tune --samples 32768 --features 768 --dtype bfloat16

Prints one row per tile, fastest first. The first row belongs in the table for this architecture and
dtype.
"""

import argparse
import re
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from himo_kernels import _triton
from himo_kernels.info_nce.compose import Settings, Statistics
from himo_kernels.info_nce.triton import tiles
from himo_kernels.info_nce.triton.gradients import Needs, gradients
from himo_kernels.info_nce.triton.logits import features_branch
from himo_kernels.info_nce.triton.losses import losses
from himo_kernels.info_nce.triton.tiles import Tile
from himo_kernels.testing import power_law

# rows x columns x inner : warps : stages
CANDIDATES = (
    *("128x128x64:8:3", "128x128x64:8:4", "128x128x32:8:4", "128x256x64:8:3", "128x128x64:4:3"),
    *("64x128x64:4:3", "64x128x64:4:4", "64x256x64:8:3", "64x64x64:4:3", "64x64x32:4:4"),
    *("64x64x32:8:2", "32x64x32:4:2", "32x32x32:4:2"),
)


def parse_tile(text: str) -> Tile:
    """Parses `ROWSxCOLUMNSxINNER:WARPS:STAGES`."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+):(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNSxINNER:WARPS:STAGES, got {text!r}")
    tile = Tile(*map(int, match.groups()))
    if tile.columns % tile.rows:
        raise argparse.ArgumentTypeError(f"expected rows to divide columns, got {text!r}")
    return tile


def time_ms(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time of a step, after one step to compile and one to warm up."""
    times = []
    for repeat in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def forward_and_backward(image: Tensor, text: Tensor, scale: Tensor) -> None:
    """Runs one loss and its gradients, without the overhead of autograd."""
    branch = features_branch(image, text, scale)
    loss, row_nll, column_nll = losses(branch, 0.0)
    needs = Needs(left=True, right=True, scale=True)
    statistics = Statistics(row_nll, column_nll, torch.ones_like(loss))
    gradients(branch, statistics, Settings(label_smoothing=0.0), needs)


def main() -> None:
    """Times the tiles given on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=32768)
    parser.add_argument("--features", type=int, default=768)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--tiles", type=parse_tile, nargs="+", default=[parse_tile(text) for text in CANDIDATES]
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = _triton.why_not(torch.empty(1, device=device))
    if reason is not None:
        parser.error(reason)
    dtype = getattr(torch, arguments.dtype)
    image, text = (
        power_law(arguments.samples, arguments.features, dtype=dtype, device=device)
        for _ in range(2)
    )
    scale = torch.tensor(100.0, device=device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    print(f"{name}, N={arguments.samples}, D={arguments.features}, {arguments.dtype}")
    timed: list[tuple[float, Tile]] = []
    for tile in arguments.tiles:
        tiles.forced = tile
        step = partial(forward_and_backward, image, text, scale)
        try:
            timed.append((time_ms(step, device, arguments.repeats), tile))
        except Exception as error:  # usually too much shared memory; Triton has no single type
            print(f"{tile} does not run: {str(error).splitlines()[0]}")
    for milliseconds, tile in sorted(timed, key=lambda row: row[0]):
        print(f"{tile} {milliseconds:.3f} ms")


if __name__ == "__main__":
    main()
