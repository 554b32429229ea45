"""A small training step on the device, as a user's run would take it."""

import dataclasses
import math
import time
from typing import Any

import torch
from torch import nn

from himo.checkpoint import CHOICES
from himo.config import TrainConfig
from himo.device import usable_device
from himo.errors import HimoError
from himo.objective import Objective
from himo.precision import resolve
from himo.run import build_model
from himo.tools.doctor.check import Check

_PAIRS = 8
_NAME = "training step"
# The tiny model takes no choices of a checkpoint, and has fewer groups than a user may unlock.
_OF_OTHER_MODELS: dict[str, Any] = {
    **dict.fromkeys(CHOICES),
    **{"lock_image": False, "lock_image_unlocked_groups": 0},
    **{"lock_text": False, "lock_text_unlocked_layers": 0},
}


def step(settings: TrainConfig) -> Check:
    """Forward and backward of the tiny model with the loss and precision of the settings."""
    generator = torch.Generator().manual_seed(0)
    try:
        device = usable_device(settings.device)
        settings = dataclasses.replace(
            settings,
            model="tiny",
            pretrained=None,
            **_OF_OTHER_MODELS,
            accum_freq=1,
            precision=resolve(settings.precision, device)[0],
        )
        begun = time.perf_counter()
        model = build_model(settings, device)
        config = model.config
        side, length = config.image_resolution, config.context_length
        pixels = (_PAIRS, 3, side, side)
        images = torch.randint(0, 256, pixels, dtype=torch.uint8, generator=generator)
        tokens = torch.randint(1, 1000, (_PAIRS, length), dtype=torch.int32, generator=generator)
        tokens[:, -1] = config.vocab_size - 1
        objective = Objective(model, settings)
        outputs = objective.backward(images.to(device), tokens.to(device), length, _PAIRS)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), math.inf))
        loss, taken_s = outputs["loss"].item(), time.perf_counter() - begun
    except HimoError as error:
        return Check(_NAME, "problem", f"none was taken: {error}")
    # Whatever a broken driver or operator raises: this check exists to report it.
    except Exception as error:
        words = str(error).strip().partition("\n")[0]
        advice = "send this report with the traceback of `himo train` as an issue"
        return Check(_NAME, "problem", f"{type(error).__name__}: {words}; {advice}")
    what = f"{_PAIRS} pairs, tiny model on {device}, {settings.loss} loss, {settings.precision}"
    found = f"{what}: loss {loss:.3f}, gradient norm {norm:.3g}, {taken_s:.2f} s"
    if not math.isfinite(loss) or not math.isfinite(norm):
        return Check(_NAME, "problem", f"{found}; not finite, send this report as an issue")
    return Check(_NAME, "ok", found)
