"""AdamW, its learning rate, and the bound on the temperature."""

import math

import torch

from himo.config import TrainConfig
from himo.model import HiMoCLIP

MAX_LOG_SCALE = math.log(100)  # CLIP's limit; its training was unstable above it


def make_optimizer(model: HiMoCLIP, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that are not frozen."""
    # Without decay: norms, biases, the class embedding and logit_scale, all below two dimensions.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    least = 0 if settings.decay_all else 2
    groups = [
        {"params": [p for p in trained if p.dim() >= least], "weight_decay": settings.wd},
        {"params": [p for p in trained if p.dim() < least], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def learning_rate(step: int, total_steps: int, settings: TrainConfig) -> float:
    """The rate at a step, counted from 0: linear over warmup steps, then a cosine to 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, total_steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clamp_temperature(model: HiMoCLIP) -> None:
    """Keeps the logit multiplier from 1 to 100, as CLIP does after each step."""
    model.logit_scale.clamp_(0, MAX_LOG_SCALE)
