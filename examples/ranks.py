"""The HiMo loss over processes: DDP's average is the gradient of one process on the joined batch.

torchrun --nproc_per_node 2 examples/ranks.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import himo_kernels as hk

ROWS, INPUTS, FEATURES = 12, 20, 16  # rows of a rank


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every rank makes the same model and the same joined batch
    tower = nn.Linear(INPUTS, FEATURES)
    pictures, captions = torch.randn(2, ranks * ROWS, INPUTS)
    own = slice(rank * ROWS, (rank + 1) * ROWS)

    # One forward of the module for both: DDP prepares one backward for each call.
    wrapped = DistributedDataParallel(tower)
    image, text = wrapped(torch.cat([pictures[own], captions[own]])).split(ROWS)
    hk.nn.HiMoLoss()(image, text, 10.0).backward()
    over_ranks = tower.weight.grad.clone()
    del wrapped  # before the group: gloo ends a process that still holds one
    dist.destroy_process_group()

    tower.weight.grad = None
    hk.nn.HiMoLoss()(tower(pictures), tower(captions), 10.0).backward()
    torch.testing.assert_close(over_ranks, tower.weight.grad, rtol=1e-4, atol=1e-5)
    if rank == 0:
        print(f"{ranks} ranks of {ROWS} pairs have the gradient of {ranks * ROWS} pairs")


if __name__ == "__main__":
    main()
