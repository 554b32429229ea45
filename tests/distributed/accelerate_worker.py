"""Errors of accelerated losses against the originals; run by torchrun, writes FOLDER/RANK.json."""

import gc
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from upstream import ReleasedCLIP, Towers, open_clip_loss

import himo_kernels
from himo_kernels.distributed import count_traffic

dist.init_process_group("gloo")
RANK, WORLD = dist.get_rank(), dist.get_world_size()
ROWS, WIDTH, FEATURES = 12, 24, 16
torch.manual_seed(int(sys.argv[2]))
batch = torch.randn(WORLD, ROWS, WIDTH, dtype=torch.float64)
image, text = batch[RANK], batch[RANK] + 0.5 * torch.randn(WORLD, ROWS, WIDTH).double()[RANK]
found: dict[str, float] = {}


def run(model: nn.Module, step) -> tuple[Tensor, list[Tensor]]:
    """Values, and gradients after DDP's mean."""
    ddp = DistributedDataParallel(model)
    values = torch.stack(step(ddp))
    values.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return values.detach(), gradients


def compare(name: str, model: nn.Module, accelerated: nn.Module, step, **options: object) -> None:
    expected = run(model, step)
    with himo_kernels.accelerate(accelerated, **options), count_traffic() as traffic:
        values, gradients = run(model, step)
    found[f"{name}, all_reduces"] = traffic.calls["all_reduce"]
    found[f"{name}, values"] = float((values - expected[0]).abs().max())
    errors = [
        (one - other).norm() / max(other.norm(), 1e-3)  # a bias's gradient is only rounding
        for one, other in zip(gradients, expected[1], strict=True)
    ]
    found[f"{name}, gradients"] = float(max(errors))


clip = open_clip_loss()
flags = itertools.product((True, False), (True, False), ("gather", "ring")) if clip else ()
for local_loss, gather_with_grad, strategy in flags:
    loss = clip.ClipLoss(local_loss, gather_with_grad, rank=RANK, world_size=WORLD)
    compare(
        f"open_clip, local_loss={local_loss}, gather_with_grad={gather_with_grad}, {strategy}",
        Towers(WIDTH, FEATURES).double(),
        loss,
        lambda ddp, loss=loss: [loss(**ddp(image, text))],
        strategy=strategy,
    )
model = ReleasedCLIP(WIDTH, FEATURES).double()
compare("released", model, model, lambda ddp: list(ddp(image, text, RANK, pca_ratio=0.9)))

Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
gc.collect()  # gloo aborts if a DDP module outlives the group
dist.destroy_process_group()
