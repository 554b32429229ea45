"""Flags of `himo train` that say nothing without others, or with which nothing would be trained."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from himo.errors import HimoError
from himo.flags import flag

if TYPE_CHECKING:
    from himo.config import TrainConfig

# Flags that only some runs read: (what they need, whether a run has it, their names).
_NEEDED: tuple[tuple[str, Callable[["TrainConfig"], bool], tuple[str, ...]], ...] = (
    (
        "--pretrained beside it",
        lambda settings: settings.pretrained is not None,
        ("activation", "vision_heads", "text_heads"),
    ),
    (
        "a validation, from --val-data or --held-out",
        lambda settings: settings.validates,
        ("val_frequency", "val_himo", "patience"),
    ),
    (
        "--lock-image beside it",
        lambda settings: settings.lock_image,
        ("lock_image_unlocked_groups",),
    ),
    (
        "--lock-text beside it",
        lambda settings: settings.lock_text,
        ("lock_text_unlocked_layers",),
    ),
    (
        "--loss himo, got clip",
        lambda settings: settings.loss == "himo",
        (
            *("preset", "tau", "lambda_comp", "lambda_global", "decompose_images", "gap_eps"),
            "cuda_graph_head",
        ),
    ),
    (
        "--lr-scheduler const-cooldown beside it",
        lambda settings: settings.lr_scheduler == "const-cooldown",
        ("epochs_cooldown",),
    ),
    ("--resume beside it", lambda settings: settings.resume is not None, ("allow_changes",)),
)


def require_needed(settings: "TrainConfig") -> None:
    """HimoError for a flag that no part of this run would read.

    A flag with its default is as good as not given, whether the command line, --config or a recipe
    has it.
    """
    defaults = {item.name: item.default for item in dataclasses.fields(settings)}
    for needed, has_it, names in _NEEDED:
        for name in names:
            if getattr(settings, name) != defaults[name] and not has_it(settings):
                raise HimoError(f"{flag(name)}: expected {needed}")


def require_training(settings: "TrainConfig") -> None:
    """HimoError if no weight of the towers would get a gradient."""
    unlocked = settings.lock_image_unlocked_groups or settings.lock_text_unlocked_layers
    if settings.lock_image and settings.lock_text and not unlocked:
        raise HimoError(
            "--lock-text: expected no --lock-image beside it, or a part of a tower to train, with "
            "--lock-image-unlocked-groups or --lock-text-unlocked-layers"
        )
    if settings.lambda_comp == settings.lambda_global == 0:
        raise HimoError("--lambda-comp: expected more than 0 beside --lambda-global 0, got 0")
    if settings.grad_clip_norm == 0:
        raise HimoError("--grad-clip-norm: expected more than 0, got 0")
