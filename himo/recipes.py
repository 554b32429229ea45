"""Recipes of `himo train`: the values of the flags that the user leaves open.

A recipe sets the model, the batch, the epochs and the learning rate. The paper's recipes are exact;
the others fit the batch and the warm-up to the number of pairs. The memory of the device decides
how many pairs of a step are computed at a time, which does not change the loss.
"""

import dataclasses
from typing import Any

from himo.clip_config import CLIPConfig
from himo.config import OPEN, OPEN_TO_PRESET, TrainConfig
from himo.errors import HimoError
from himo.memory import step_bytes
from himo_kernels.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Values of the flags of the same names; `warmup` is the longest one of an adapted schedule."""

    batch_size: int
    epochs: int
    lr: float
    wd: float
    warmup: int


# HiMo-CLIP, arXiv 2511.06653, section 4.1: 1.2 million pairs, and a trained CLIP to start from.
_PAPER = Recipe(batch_size=128, epochs=10, lr=1e-6, wd=1e-2, warmup=200)
_PAPER_TOGETHER = 1024  # pairs contrasted together, on 8 GPUs
_PAPER_PAIRS = 1_000_000  # from here on a data set is as large as the paper's
# The rate at which the scripts of FLYP (arXiv 2212.00638) fine-tune CLIP on smaller data sets, with
# the contrastive loss. At the paper's rate, a tenth of it, a short run changes nothing.
_FINE_TUNE = dataclasses.replace(_PAPER, lr=1e-5)
# open_clip's example of a training from random weights on one GPU. Its 3 million pairs take 680,000
# steps.
_FROM_SCRATCH = Recipe(batch_size=128, epochs=30, lr=1e-3, wd=0.1, warmup=10_000)

# Settings of the training that a preset chooses in addition to the switches of the loss. Where the
# paper says nothing, `paper` does as open_clip does. `official` is the released run file,
# train/run_scripts/run_train.sh. Where that says nothing, it is train/train.py (commit f235e97);
# the run file replaces its default of tau, 0.85. 4.6052 is ln 100 rounded up, above the clamp.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "keep_last_batch": False,
        "same_order": False,
        "decay_all": False,
        "clamp_scale": True,
    },
    "official": {
        "keep_last_batch": True,
        "same_order": True,
        "decay_all": True,
        "clamp_scale": False,
        "log_scale": 4.6052,
        "tau": 0.9,
    },
}

_MODELS = {"paper-b16": "ViT-B-16", "paper-l14": "ViT-L-14"}
# New models from the largest on: (pairs from which on it is taken, name). Our choice: CLIPs of this
# size are not published for fewer pairs, and the tiny model of the demo learns from hundreds.
_BY_PAIRS = ((10_000_000, "ViT-B-16"), (1_000_000, "ViT-B-32"), (0, "tiny"))
_STEPS_PER_EPOCH = 8  # at least, where the batch is adapted
_LEAST_TOGETHER = 8  # pairs: fewer have too few negatives
_WARMUP_SHARE = 10  # a tenth of the steps
_MEMORY_SHARE = 0.8  # of the free memory: `step_bytes` counts no workspaces and no fragments
_FEW_STEPS = 50  # below, no schedule learns
# Rates far from every recipe: a new model learns nothing below, a trained one forgets above.
_LEAST_NEW_LR, _MOST_FINE_TUNE_LR = 1e-5, 1e-4


def with_model(settings: TrainConfig, pairs: int | None) -> TrainConfig:
    """The settings with the preset's values, and with a model unless --pretrained has its own.

    Args:
        pairs: to train on; None if unknown, which counts as the number in the paper.

    Raises:
        HimoError: a recipe for a new model, and a checkpoint.
    """
    settings = _filled(settings, _PRESETS[settings.preset])
    if settings.pretrained is not None:
        if settings.recipe == "from-scratch":
            raise HimoError("--recipe from-scratch: expected no --pretrained")
        return settings
    if not _is_open(settings, "model"):
        return settings
    count = _PAPER_PAIRS if pairs is None else pairs
    by_pairs = next(name for least, name in _BY_PAIRS if count >= least)
    return dataclasses.replace(settings, model=_MODELS.get(settings.recipe, by_pairs))


def with_schedule(
    settings: TrainConfig,
    pairs: int | None,
    *,
    processes: int = 1,
    config: CLIPConfig | None = None,
    free: int = 0,
) -> TrainConfig:
    """The settings with every open value chosen.

    Args:
        pairs: as for `with_model`.
        processes: of the run; the batch is of one of them.
        config: of the model.
        free: bytes of the device; 0, or no config, for no limit.
    """
    count = _PAPER_PAIRS if pairs is None else pairs
    recipe = _recipe(settings, count)
    exact = settings.recipe in _MODELS
    together = recipe.batch_size if exact else _together(recipe.batch_size, count // processes)
    batch, accum = settings.batch_size, settings.accum_freq
    if _is_open(settings, "batch_size"):
        batch = max(2, together // (accum or 1))
        limit = int(_MEMORY_SHARE * free)

        def fits(size: int) -> bool:
            return not (config and free) or step_bytes(config, settings, size, processes) <= limit

        while batch > 2 and not fits(batch):
            batch //= 2
        # The loss of the same pairs, computed in parts, is the same.
        accum = accum or max(1, together // batch)
    settings = dataclasses.replace(
        settings,
        batch_size=batch,
        accum_freq=accum or 1,
        epochs=settings.epochs or recipe.epochs,
    )
    warmup = recipe.warmup
    if not exact:
        warmup = min(warmup, total_steps(settings, count, processes) // _WARMUP_SHARE)
    return _filled(settings, {"lr": recipe.lr, "wd": recipe.wd, "warmup": warmup})


def total_steps(settings: TrainConfig, pairs: int, processes: int = 1) -> int:
    """The steps of a whole run on this many pairs."""
    together = settings.batch_size * settings.accum_freq * processes
    return settings.epochs * (
        -(-pairs // together) if settings.keep_last_batch else pairs // together
    )


def chosen(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    """The values that a recipe or preset chose, by flag.

    Steps of one batch and the values of the paper's preset are not reported as choices.
    """
    names = (*OPEN, *OPEN_TO_PRESET)
    values = {name: getattr(after, name) for name in names if _is_open(before, name)}
    nothing = {"model": None, "accum_freq": 1}  # None: a checkpoint brings its own
    nothing |= {name: _PRESETS["paper"].get(name) for name in OPEN_TO_PRESET}
    return {n: v for n, v in values.items() if n not in nothing or v != nothing[n]}


def taken_up(settings: TrainConfig, before: dict[str, Any]) -> TrainConfig:
    """The settings of a resumed run: flags that the user leaves open are as in its checkpoint."""
    names = (*OPEN, *OPEN_TO_PRESET)
    values = {name: before[name] for name in names if before.get(name) is not None}
    if "decay_all" not in before:  # a checkpoint of a himo without these flags
        preset = before["preset"]
        threshold = PRESETS[preset]["variance_threshold"]
        values = _PRESETS["paper"] | {"clamp_scale": preset == "paper", "tau": threshold} | values
    if settings.loss != "himo":  # it may have begun with HiMo's, which alone has a tau
        values.pop("tau", None)
    return _filled(settings, values)


def doubts(settings: TrainConfig, steps: int) -> list[str]:
    """Reasons why a schedule of this many steps would hardly train, each with advice."""
    found = []
    lr = f"--lr {settings.lr:g}"
    if settings.warmup >= steps:
        found.append(
            f"--warmup {settings.warmup} takes longer than the {steps} steps of this run, whose "
            f"learning rate stays below {lr}"
        )
    if steps < _FEW_STEPS:
        found.append(f"{steps} steps are few: more --epochs or a smaller --batch-size give more")
    if settings.lr == 0:
        found.append(f"{lr} changes no weight")
    elif settings.pretrained is None and settings.lr < _LEAST_NEW_LR:
        found.append(
            f"{lr} is for a trained model, and without --pretrained this one is new: "
            f"--recipe from-scratch takes {_FROM_SCRATCH.lr:g}"
        )
    if settings.pretrained is not None and settings.lr > _MOST_FINE_TUNE_LR:
        found.append(
            f"{lr} is for a new model, and that of --pretrained may forget what it knows: "
            f"--recipe auto takes at most {_FINE_TUNE.lr:g}"
        )
    return found


def other_batch(settings: TrainConfig, together: int) -> str | None:
    """A note if a run of the paper's recipe does not contrast 1,024 pairs together, else None."""
    if settings.recipe not in _MODELS or together == _PAPER_TOGETHER:
        return None
    said = (
        f"--recipe {settings.recipe}: the paper contrasts {_PAPER_TOGETHER} pairs together, 128 on "
        f"each of 8 GPUs, and this run {together}"
    )
    times, rest = divmod(_PAPER_TOGETHER * settings.accum_freq, together)
    return said if rest or not times else f"{said}; --accum-freq {times} has as many"


def _is_open(settings: TrainConfig, name: str) -> bool:
    return getattr(settings, name) is None


def _filled(settings: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    unset = {name: value for name, value in values.items() if _is_open(settings, name)}
    return dataclasses.replace(settings, **unset)


def _recipe(settings: TrainConfig, pairs: int) -> Recipe:
    if settings.recipe in _MODELS:
        return _PAPER
    if settings.pretrained is None:
        return _FROM_SCRATCH
    return _PAPER if pairs >= _PAPER_PAIRS else _FINE_TUNE


def _together(most: int, pairs: int) -> int:
    """Pairs of one process contrasted together, a power of two: several steps for an epoch."""
    wanted = min(most, max(_LEAST_TOGETHER, pairs // _STEPS_PER_EPOCH), pairs)
    return 1 << (max(2, wanted).bit_length() - 1)
