"""What a sharded run holds on each rank; run by torchrun, writes FOLDER/RANK.json."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from measured_step import DOT, SETTINGS
from torch import Tensor

from himo import parallel, sharding
from himo.model import CONFIGS
from himo.objective import Objective
from himo.optimizer import make_optimizer
from himo.run import build_model

# Of sizes that 3 does not divide. With few pairs and most weights in blocks, saving is the peak.
BLOCKS = dataclasses.replace(DOT, vision_layers=4, vision_width=64, text_layers=4, text_width=64)
FEW = dataclasses.replace(SETTINGS, model="blocks", fsdp=True, batch_size=2)
CPU = torch.device("cpu")


def held(tensors: list[Tensor]) -> int:
    """The bytes of the memory of this rank's parts, with what pads them."""
    storages = [sharding.local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def parts(ranks: parallel.Ranks) -> dict[str, int]:
    """What this rank holds after a step."""
    model = build_model(FEW, CPU)
    whole = sum(p.nbytes for p in model.parameters())
    objective = Objective(model, FEW, ranks)
    optimizer = make_optimizer(model, FEW)
    side, length = BLOCKS.image_resolution, BLOCKS.context_length
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    objective.backward(images, torch.randint(1, 64, (2, length)), None, 2)
    optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    states = [x for state in optimizer.state.values() for x in state.values()]
    return {
        "parameters": held(list(model.parameters())),
        "gradients": held([p.grad for p in trained]),
        "optimizer state": held(states),
        "whole weights": whole,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    CONFIGS["blocks"] = BLOCKS
    torch.set_num_threads(1)
    with parallel.join("cpu", 120) as ranks:
        Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(parts(ranks)))
    parallel.end_process()
