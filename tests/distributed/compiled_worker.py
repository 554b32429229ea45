"""Compiled towers in DDP beside those that are not; run by torchrun, writes FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

import torch
from train_runs import SMALL

import himo
from himo import parallel
from himo.config import TrainConfig
from himo.model import HiMoCLIP
from himo.objective import Objective
from himo_kernels.testing import relative_error


def made(ranks: parallel.Ranks, *, compiles: bool) -> Objective:
    torch.manual_seed(0)
    settings = TrainConfig(train_data="none", accum_freq=1, tau=0.9, compile=compiles)
    return Objective(HiMoCLIP(SMALL), settings, ranks)


def gradient(objective: Objective) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in objective.parameters() if p.requires_grad])


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.join("cpu", 60) as ranks:
        plain, compiled = (made(ranks, compiles=flag) for flag in (False, True))
        assert compiled.towers.module._compiled_call_impl is not None
        compiled.towers.module.compile(fullgraph=True, backend="aot_eager")
        generator = torch.Generator().manual_seed(ranks.rank)
        errors = []
        for words in (3, 9):
            images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
            texts = [f"card {n} of rank {ranks.rank} " + "and more " * words for n in range(8)]
            for objective in (plain, compiled):
                objective.zero_grad()
                objective.backward(images, himo.tokenize(texts), 2 * words + 12, 8)
            errors.append(relative_error(gradient(compiled), gradient(plain)))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = {"errors": errors, "graphs": graphs}
        Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(found))
    parallel.end_process()
