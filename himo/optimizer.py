"""AdamW, its learning rate, and the bound on the temperature."""

import math
from typing import Any

import torch

from himo import sharding
from himo.config import TrainConfig
from himo.model import HiMoCLIP

MAX_LOG_SCALE = math.log(100)  # CLIP's limit; its training was unstable above it


def make_optimizer(model: HiMoCLIP, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are not frozen.

    A group of parameters has `lr_scale`, its share of the learning rate: 1 without --layer-decay.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = lr_scales(model, settings.layer_decay)
    # Without decay: norms, biases, the class embedding and logit_scale, all below two dimensions.
    least = 0 if settings.decay_all else 2
    groups: list[dict[str, Any]] = []
    for scale in sorted(set(scales.values()), reverse=True):
        of_scale = [parameter for name, parameter in trained if scales[name] == scale]
        decayed, others = (
            [p for p in of_scale if (p.dim() >= least) == big] for big in (True, False)
        )
        groups.append({"params": decayed, "weight_decay": settings.wd, "lr_scale": scale})
        groups.append({"params": others, "weight_decay": 0.0, "lr_scale": scale})
    return torch.optim.AdamW(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        # One kernel for all weights instead of one for each operation. None leaves it to torch.
        fused=True if model.logit_scale.device.type in ("cpu", "cuda") else None,
    )


def lr_scales(model: HiMoCLIP, decay: float | None) -> dict[str, float]:
    """The share of the learning rate that each parameter has, by name.

    decay^(n + 1 - i) in block i of a tower of n, counted from 1, as in BEiT (arXiv 2106.08254). The
    embeddings count as block 0, and the norm after block n counts as part of it. The projections
    and logit_scale have the whole rate.

    Args:
        decay: None for the whole rate everywhere.
    """
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if decay is None:
        return scales
    for tower in model.layer_groups():
        for above, group in enumerate(reversed(tower)):
            for name in group:
                scales[name] = decay**above
    return scales


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Gives each group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(step: int, total_steps: int, settings: TrainConfig) -> float:
    """The rate at a step, counted from 0: linear over warmup steps, then as --lr-scheduler.

    Until total_steps, "cosine" falls to 0, "const" keeps --lr, and "const-cooldown" keeps it up to
    the last epochs_cooldown epochs, in which it falls to 0 along a line.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.lr_scheduler == "cosine":
        progress = (step - settings.warmup) / max(1, total_steps - settings.warmup)
        return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.epochs_cooldown is None:
        return settings.lr
    cooldown = total_steps * settings.epochs_cooldown // settings.epochs
    return settings.lr * min(1.0, (total_steps - step) / max(1, cooldown))


@torch.no_grad()
def clamp_temperature(model: HiMoCLIP) -> None:
    """Keeps the logit multiplier from 1 to 100, as CLIP does after each step."""
    sharding.local(model.logit_scale).clamp_(0, MAX_LOG_SCALE)
