"""Bytes of real training steps on this CPU; as a program, also those of himo.tools.footprint, JSON.

Each process measures once. torch's profiler sees every allocation of torch's CPU allocator, inside
an operation too; the highest sum of those alive is the peak. Two steps: the second one holds the
optimizer's state as well as its activations, like any later one.
"""

import dataclasses
import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile

from himo.average import AverageWeights
from himo.config import TrainConfig
from himo.model import CONFIGS, CLIPConfig
from himo.objective import Objective
from himo.parallel import Ranks
from himo.tools.footprint import Rehearsal
from himo.train import build_model, make_optimizer

# Towers so small that the loss of a large batch takes most of the memory.
DOT = CLIPConfig(
    embed_dim=16,
    image_resolution=16,
    vision_layers=1,
    vision_width=16,
    vision_patch_size=16,
    context_length=21,
    vocab_size=64,
    text_width=16,
    text_layers=1,
)
SETTINGS = TrainConfig(
    train_data="none", model="dot", batch_size=64, accum_freq=1, lr=1e-6, wd=0.01
)
CASES = {
    "tiny": {"model": "tiny", "batch_size": 16},
    "tiny, few pairs": {"model": "tiny", "batch_size": 2},  # the optimizer's step is the peak
    "bfloat16": {"batch_size": 512, "precision": "amp_bf16"},
    "recomputed, frozen images": {"grad_checkpointing": True, "lock_image": True},
    "average": {"model": "tiny", "batch_size": 2, "ema": 0.9},
    "large loss": {"batch_size": 1024},
    "accumulated, clip loss": {"batch_size": 256, "accum_freq": 5, "loss": "clip"},
}


def measured(settings: TrainConfig) -> int:
    """Bytes at the peak of two real steps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        network = build_model(settings, torch.device("cpu"))
        objective = Objective(network, settings, Ranks(), backend="reference")
        optimizer = make_optimizer(network, settings)
        for group in optimizer.param_groups:
            group |= {"foreach": True, "fused": None}  # as it is counted
        average = None if settings.ema is None else AverageWeights(network, settings.ema)
        pairs = settings.batch_size * settings.accum_freq
        side, length = network.visual.input_resolution, network.context_length
        for _ in range(2):
            images = torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8)
            words = network.config.vocab_size - 1
            tokens = torch.randint(1, words, (pairs, length), dtype=torch.int32)
            tokens[:, -1] = words
            optimizer.zero_grad(set_to_none=True)
            objective.backward(images, tokens, length, settings.batch_size)
            torch.nn.utils.clip_grad_norm_(network.parameters(), float("inf"))
            optimizer.step()
            if average is not None:
                average.update()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = highest = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        alive += change
        highest = max(highest, alive)
    return highest


if __name__ == "__main__":
    torch.manual_seed(0)
    CONFIGS["dot"] = DOT
    found = {}
    for name, changes in CASES.items():
        settings = dataclasses.replace(SETTINGS, **changes)
        memory = Rehearsal(settings).step()
        found[name] = {"measured": measured(settings), "parts": memory.parts}
        found[name]["phase"] = memory.phase
    json.dump(found, sys.stdout)
