"""Steps of sharded towers beside DDP's on each rank; run by torchrun, writes FOLDER/RANK.json."""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from train_runs import SMALL

import himo
from himo import parallel, sharding
from himo.config import TrainConfig
from himo.model import HiMoCLIP
from himo.objective import Objective
from himo.optimizer import clamp_temperature, make_optimizer
from himo_kernels.testing import relative_error

ROWS = 8
SCALE = 256.0  # of the loss, so small that no gradient overflows float16
LIMIT = 1e-3  # of the gradient's norm, which is larger


def made(ranks: parallel.Ranks, precision: str, *, fsdp: bool) -> tuple[HiMoCLIP, Objective]:
    torch.manual_seed(0 if fsdp else ranks.rank)  # the processes begin with rank 0's weights
    model = HiMoCLIP(SMALL)
    model.lock_image_tower(2)
    settings = TrainConfig(
        train_data="none",
        precision=precision,
        fsdp=fsdp,
        lr=1e-2,
        wd=0.0,
        tau=0.9,
        grad_checkpointing=True,
    )
    model.set_grad_checkpointing()
    return model, Objective(model, settings, ranks)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 255, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, himo.tokenize([f"card {number} of rank {rank}" for number in range(ROWS)])


def trained(model: HiMoCLIP) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: HiMoCLIP) -> Tensor:
    return torch.cat([sharding.whole(p.grad).flatten() for p in trained(model).values()])


def weights(model: HiMoCLIP) -> Tensor:
    return torch.cat([sharding.whole(p.detach()).flatten() for p in model.parameters()])


def compared(ranks: parallel.Ranks, precision: str) -> dict[str, object]:
    """Gradients, norms and clipped gradients; with a scaler, a step that one rank overflows."""
    images, tokens = batch(ranks.rank)
    plain, of_plain = made(ranks, precision, fsdp=False)
    model, objective = made(ranks, precision, fsdp=True)
    settings = TrainConfig(train_data="none", lr=1e-2, wd=0.0)  # of the optimizers
    optimizers = [make_optimizer(network, settings) for network in (plain, model)]
    for one, optimizer in zip((of_plain, objective), optimizers, strict=True):
        if precision == "amp":
            one.scaler.load_state_dict(one.scaler.state_dict() | {"scale": SCALE})
        one.backward(images, tokens, 12, ROWS)
        one.scaler.unscale_(optimizer)
    found: dict[str, object] = {"gradient": relative_error(gradients(model), gradients(plain))}
    norms = (
        sharding.clip_grad_norm_(model.parameters(), LIMIT),
        nn.utils.clip_grad_norm_(plain.parameters(), LIMIT),
    )
    found["norm"] = relative_error(*norms)
    found["clipped"] = float(norms[1]) > LIMIT
    found["clipped gradient"] = relative_error(gradients(model), gradients(plain))
    objective.scaler.update()
    before = weights(model)
    optimizers[1].zero_grad()
    objective.backward(images, tokens, 12, ROWS)
    if ranks.rank == 1:
        sharding.local(model.visual.proj.grad).fill_(math.inf)
    objective.scaler.step(optimizers[1])
    objective.scaler.update()
    found["changed"] = not torch.equal(weights(model), before)
    found["scale"] = objective.scaler.get_scale()
    return found


def share(tensors: list[Tensor]) -> float:
    """Of the bytes of whole tensors, those that this rank holds."""
    storages = [sharding.local(tensor).untyped_storage() for tensor in tensors]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(held.values()) / sum(4 * tensor.numel() for tensor in tensors)


def held(ranks: parallel.Ranks) -> dict[str, object]:
    """What this rank has of weights, gradients and moments, and what of a copy differs."""
    model, objective = made(ranks, "fp32", fsdp=True)
    optimizer = make_optimizer(model, TrainConfig(train_data="none", lr=1e-2, wd=0.0))
    objective.backward(*batch(ranks.rank), 12, ROWS)
    optimizer.step()
    sharding.local(model.logit_scale.data).fill_(7)
    clamp_temperature(model)
    found: dict[str, object] = {"scale": float(sharding.whole(model.logit_scale).exp())}
    parameters = list(trained(model).values())
    moments = [v for s in optimizer.state.values() for key, v in s.items() if key != "step"]
    tensors = {
        "weights": list(model.parameters()),
        "gradients": [p.grad for p in parameters],
        "moments": moments,
    }
    every = [t for kept in tensors.values() for t in kept]
    parts = [sharding.part(sharding.whole(t), t) for t in every]
    found["shares"] = {n: share(kept) for n, kept in (tensors | {"parts": parts}).items()}
    pairs = zip(parts, every, strict=True)
    found["equal"] = all(torch.equal(sharding.local(a), sharding.local(b)) for a, b in pairs)
    state = sharding.gathered(model.state_dict().items(), keep=True)
    shapes = {name: tensor.shape for name, tensor in HiMoCLIP(SMALL).state_dict().items()}
    found["shapes"] = {name: tensor.shape for name, tensor in state.items()} == shapes
    copy = sharding.whole_model(model, {}, keep=ranks.main)
    found["copy"] = copy is not None and all(
        torch.equal(tensor, state[name]) for name, tensor in copy.state_dict().items()
    )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.join("cpu", 60) as ranks:
        results = {name: compared(ranks, name) for name in ("fp32", "amp")} | {"held": held(ranks)}
        Path(sys.argv[1], f"{ranks.rank}.json").write_text(json.dumps(results))
    parallel.end_process()
