"""One rank of a worker file under torchrun: joins the group on import, notes and writes its checks.

A check compares this rank's values or gradients with those of the joined batch in one process. All
ranks draw the same batch and use their own rows of it.
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from himo.parallel import end_process

# Fills torch.empty with NaN.
torch.set_deterministic_debug_mode("error")
dist.init_process_group("gloo")
RANK, WORLD = dist.get_rank(), dist.get_world_size()
SEED = int(sys.argv[2])
DTYPES = {"float32": torch.float32, "float64": torch.float64}
WIDTH = 12
COUNTS = {
    "equal": [8] * WORLD,
    "uneven": [9, 16, 4][:WORLD] if WORLD > 1 else [20],
    "an empty rank": [0, 20, 13][:WORLD] if WORLD > 1 else [20],
    "one row each": [1] * WORLD,
}
found: dict[str, Any] = {}


def normalized_pairs(
    counts: list[int], dtype: torch.dtype, *scalars: float
) -> tuple[list[Tensor], torch.Generator]:
    """Images and texts [N, WIDTH] of the joined batch and these scalars, and what drew them."""
    generator = torch.Generator().manual_seed(SEED + sum(counts))
    draw = {"dtype": torch.float64, "generator": generator}
    images, texts = (F.normalize(torch.randn(sum(counts), WIDTH, **draw), dim=-1) for _ in range(2))
    texts = F.normalize(texts + images, dim=-1)
    values = (torch.tensor(scalar, dtype=torch.float64) for scalar in scalars)
    return [tensor.to(dtype) for tensor in (images, texts, *values)], generator


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def own(tensor: Tensor, counts: list[int], rank: int = RANK) -> Tensor:
    return tensor.split(counts)[rank]


def own_leaves(tensors: list[Tensor], counts: list[int]) -> list[Tensor]:
    """This rank's rows of images and texts, and every scalar."""
    images, texts, *scalars = tensors
    return leaves(own(images, counts), own(texts, counts), *scalars)


class LinearTowers(nn.Module):
    """Two towers of one matrix, a scale and further scalars: a minimal model for DDP."""

    def __init__(self, **scalars: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(WIDTH, 7, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        named = {name: nn.Parameter(torch.tensor(value)) for name, value in scalars.items()}
        self.scalars = nn.ParameterDict(named)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        towers = zip((self.image, self.text), (images, texts), strict=True)
        features = (F.normalize(tower(rows), dim=-1) for tower, rows in towers)
        return *features, self.log_scale.exp(), *self.scalars.values()


def gradients(towers: nn.Module) -> Tensor:
    return parameters_to_vector([parameter.grad for parameter in towers.parameters()])


def finish() -> NoReturn:
    """Writes what was found and ends the process."""
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    end_process()
