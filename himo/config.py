"""TrainConfig: one field for each flag of `himo train`, with its unit of measure and help.

Flags that open_clip has are named as there. "paper" marks the values of HiMo-CLIP (arXiv
2511.06653, section 4.1): 8 GPUs with 128 pairs each, 10 epochs, AdamW, 248 tokens. Values of OPEN
are None until `himo.recipes` chooses them.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from himo.config_checks import require_needed, require_training
from himo.config_file import read_config
from himo.errors import HimoError
from himo.flags import flag


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainConfig:
    """Everything that decides a run, stored as config.json in its folder."""

    # Data
    train_data: str = _flag("", "data set: sharegpt4v json, csv, tsv, jsonl, folder or tar shards")
    dataset_type: str = _flag(
        "auto", "auto, sharegpt4v, csv, jsonl, image-list, flickr, dci, folder, webdataset"
    )
    image_root: str | None = _flag(None, "directory that image paths are relative to")
    csv_separator: str | None = _flag(None, "of a csv file; by default tab, comma or semicolon")
    csv_img_key: str | None = _flag(None, "column of the image; by default filepath, image, ...")
    csv_caption_key: str | None = _flag(None, "column of the caption; default title, caption, ...")
    skip_missing_images: bool = _flag(False, "train without the images that are not there")
    follow_links: bool = _flag(False, "let links below the image root lead out of it")
    short_captions: bool = _flag(False, "train on caption_short where a record has one")
    train_num_samples: int | None = _flag(None, "pairs to train on, the first ones; default all")
    max_bad_fraction: float = _flag(0.01, "share of unreadable images that ends the run")
    image_mode: Literal["exact", "fast"] = _flag("exact", "exact resize, or the faster one")
    workers: int = _flag(2, "processes that read images; 0 reads in the training process")
    token_cache: bool = _flag(True, "cache the captions' tokens in a file next to the index")

    # Validation: retrieval, into metrics.jsonl
    val_data: str | None = _flag(None, "data set to validate on, read with the same data flags")
    held_out: int = _flag(0, "or: first pairs of train-data, then not trained on; ShareGPT4V 1000")
    val_frequency: int = _flag(1, "epochs between two validations; the last epoch has one too")
    val_himo: bool = _flag(False, "also measure HiMo@2 and HiMo@3: more texts, more time")
    patience: int = _flag(0, "validations without a better R@1 that end the run; 0: none do")

    # Model
    recipe: Literal["auto", "paper-b16", "paper-l14", "from-scratch"] = _flag(
        "auto", "chooses the flags marked (recipe) that are not given"
    )
    model: str = _flag(None, "configuration of a new model; --pretrained decides its own (recipe)")
    pretrained: str | None = _flag(None, "checkpoint to start from, of any format himo loads")
    activation: Literal["quick_gelu", "gelu"] | None = _flag(
        None, "of the --pretrained model, where its file does not state it"
    )
    vision_heads: int | None = _flag(None, "attention heads, where its file does not state them")
    text_heads: int | None = _flag(None, "attention heads, where its file does not state them")
    lock_image: bool = _flag(False, "freeze the image tower")
    lock_image_unlocked_groups: int = _flag(
        0, "last groups of it to train all the same: 1 its projection, 2 also its last block, ..."
    )
    lock_text: bool = _flag(False, "freeze the text tower")
    lock_text_unlocked_layers: int = _flag(0, "as --lock-image-unlocked-groups, of the text tower")
    grad_checkpointing: bool = _flag(False, "recompute activations: less memory, more time")
    channels_last: bool = _flag(
        False, "images in memory as [B, R, R, 3], as cuDNN's half-precision kernels take them"
    )
    compile: bool = _flag(
        False, "torch.compile for the towers and the loss; needs a C++ compiler on a CPU"
    )

    # Loss
    loss: Literal["himo", "clip"] = _flag("himo", "HiMo loss, or plain CLIP for comparison")
    preset: Literal["paper", "official"] = _flag(
        "paper", "the paper, or the released code's run file: HiMo loss and flags marked (preset)"
    )
    tau: float | None = _flag(None, "share of the variance HiDe keeps; both presets 0.9")
    lambda_comp: float | None = _flag(None, "weight of the component loss; paper 1")
    lambda_global: float | None = _flag(None, "weight of the contrastive loss; paper 1, or 0")
    decompose_images: bool = _flag(False, "component loss of images' own components; table 5")
    label_smoothing: float | None = _flag(None, "label smoothing; paper 0, released code 0.1")
    log_scale: float | None = _flag(
        None, "logarithm of the first temperature; default the model's, released code 4.6052"
    )
    clamp_scale: bool = _flag(
        None, "keep the temperature at or below 100; paper, not the released code (preset)"
    )
    gap_eps: float = _flag(1e-4, "floor of HiDe's eigenvalue gap; caps rare gradient spikes")
    cuda_graph_head: bool = _flag(
        False, "HiMo loss as CUDA graphs: one GPU, batches <= 128; not yet run on hardware"
    )

    # Optimisation
    batch_size: int = _flag(
        None, "pairs in a batch of one process; paper 128 on each of 8 GPUs (recipe)"
    )
    accum_freq: int = _flag(
        None, "batches that make one: contrasted together, in the memory of one (recipe)"
    )
    keep_last_batch: bool = _flag(
        None, "also train on the smaller batch at an epoch's end; released code (preset)"
    )
    same_order: bool = _flag(None, "every epoch in the first one's order; released code (preset)")
    epochs: int = _flag(None, "passes over the data; paper 10 (recipe)")
    lr: float = _flag(None, "peak learning rate; paper 1e-6, for fine-tuning (recipe)")
    wd: float = _flag(None, "weight decay of matrices; paper 1e-2 (recipe)")
    decay_all: bool = _flag(
        None, "decay biases, norms and the temperature too; released code (preset)"
    )
    beta1: float = _flag(0.9, "AdamW; paper 0.9")
    beta2: float = _flag(0.999, "AdamW; paper 0.999")
    eps: float = _flag(1e-8, "AdamW")
    layer_decay: float | None = _flag(
        None, "learning rate of each block, as a share of the next block's; the heads have --lr"
    )
    warmup: int = _flag(None, "steps to the peak learning rate; paper 200 (recipe)")
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = _flag(
        "cosine", "after the warm-up: a cosine to 0, --lr to the end, or --lr and a line to 0"
    )
    epochs_cooldown: int | None = _flag(None, "last epochs in which const-cooldown falls to 0")
    force_warmup: bool = _flag(False, "train although the warm-up is as long as the run")
    grad_clip_norm: float | None = _flag(None, "largest norm of the gradient")
    ema: float | None = _flag(
        None, "decay of an average of the weights, which is then validated and saved: 0.999"
    )
    on_nonfinite: Literal["raise", "skip"] = _flag(
        "raise",
        "NaN or inf in a loss or gradient: end the run, or skip the step; 10 in a row end it",
    )
    exchange: Literal["gather", "ring"] = _flag(
        "gather", "of texts between processes; ring: O(N/W)"
    )
    fsdp: bool = _flag(
        False, "share weights, gradients and moments out to the processes, with FSDP2"
    )
    rank_timeout: float = _flag(15.0, "seconds without a sign of life until a process is gone")
    precision: Literal["fp32", "amp", "amp_bf16", "auto"] = _flag(
        "fp32",
        "float32, autocast of float16 with a scaled loss or of bfloat16, or auto: float32 or "
        "bfloat16, whichever is faster on the device",
    )
    seed: int = _flag(0, "of the initial weights, the order of the data and replaced images")
    device: str = _flag("auto", "cpu, cuda, cuda:N, or auto: cuda where there is one")
    threads: int = _flag(0, "CPU threads of torch; 0 leaves torch's default")

    # Records
    logs: str = _flag("logs", "directory of all runs")
    name: str | None = _flag(None, "of this run; default MODEL-LOSS-SEED, or RECIPE-LOSS-SEED")
    log_every_n_steps: int = _flag(10, "steps between two lines of metrics.jsonl")
    save_frequency: int = _flag(1, "epochs between two checkpoints")
    save_every_n_steps: int = _flag(0, "steps between two checkpoints within an epoch; 0: none")
    keep_checkpoints: int = _flag(2, "newest checkpoints kept, and the best; 0 keeps all")
    report_to: str | None = _flag(None, "also write the metrics for: tensorboard, wandb, or both")
    dry_run: bool = _flag(False, "check everything, take two steps, print the plan, write nothing")
    resume: str | None = _flag(None, "'latest' checkpoint of this run, or a path")
    allow_changes: str | None = _flag(
        None, "flags that may differ from those of the resumed checkpoint: lr,epochs"
    )

    def __post_init__(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                finite = "" if abs(value) < math.inf else "a finite number, "
                raise HimoError(f"{flag(name)}: expected {finite}at least {minimum}, got {value}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise HimoError(f"{flag(name)}: expected {low} to {high}, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise HimoError(f"--{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in self.reports:
            if name not in _REPORTS:
                expected = " or ".join(_REPORTS)
                raise HimoError(f"--report-to: expected {expected}, got {name!r}")
        if self.val_data is not None and self.held_out:
            raise HimoError("--held-out: expected none beside --val-data, or no --val-data")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise HimoError(f"--ema: expected a number in [0, 1), got {self.ema}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise HimoError(f"--layer-decay: expected a number in (0, 1], got {self.layer_decay}")
        if self.epochs_cooldown is None and self.lr_scheduler == "const-cooldown":
            raise HimoError("--epochs-cooldown: expected beside --lr-scheduler const-cooldown")
        if self.epochs and self.epochs_cooldown and self.epochs_cooldown > self.epochs:
            raise HimoError(
                f"--epochs-cooldown: expected at most the {self.epochs} epochs of the run, got "
                f"{self.epochs_cooldown}"
            )
        if self.tau is not None and not 0 < self.tau <= 1:
            raise HimoError(f"--tau: expected a number in (0, 1], got {self.tau}")
        if self.fsdp and self.compile:
            raise HimoError("--fsdp: expected no --compile beside it")
        if not self.train_data:
            raise HimoError("--train-data: expected a data set, got none")
        for name in self.allowed:
            if name not in (*AT_RESUME["refuse"], "processes"):
                raise HimoError(
                    f"--allow-changes: expected names of {', '.join(AT_RESUME['refuse'])} or "
                    f"processes, got {name!r}"
                )
        if self.name is not None and ("/" in self.name or self.name in ("", ".", "..")):
            raise HimoError(f"--name: expected a directory name, got {self.name!r}")
        require_needed(self)
        require_training(self)

    @property
    def run_name(self) -> str:
        """The directory of the run below logs."""
        return self.name or f"{self.model or self.recipe}-{self.loss}-{self.seed}"

    @property
    def folder(self) -> Path:
        """The directory of the run."""
        return Path(self.logs) / self.run_name

    @property
    def validates(self) -> bool:
        """Whether the run has pairs to validate on."""
        return self.val_data is not None or self.held_out > 0

    @property
    def allowed(self) -> list[str]:
        """The names in allow_changes."""
        return [name.strip("-").replace("-", "_") for name in _names(self.allow_changes)]

    @property
    def reports(self) -> list[str]:
        """The names in report_to."""
        return _names(self.report_to)


# What a recipe or preset chooses where it is None.
OPEN = ("model", "batch_size", "accum_freq", "epochs", "lr", "wd", "warmup")
OPEN_TO_PRESET = ("keep_last_batch", "same_order", "decay_all", "clamp_scale", "log_scale", "tau")
_REPORTS = ("tensorboard", "wandb")

# What --resume does with a flag that differs from the checkpoint's. resume.py also compares the
# content of the data and the model.
AT_RESUME: dict[str, tuple[str, ...]] = {
    # They change the order of the samples or the length of an epoch, so nothing can be continued.
    # A recipe chooses nothing any more: open flags are as in the checkpoint.
    "never": ("recipe", "seed", "train_num_samples", "held_out", "keep_last_batch", "same_order"),
    # They change the result. --allow-changes lets them differ; metrics.jsonl records it.
    "refuse": (
        *("train_data", "val_data", "short_captions", "image_mode"),
        *("pretrained", "lock_image", "lock_image_unlocked_groups"),
        *("lock_text", "lock_text_unlocked_layers"),
        *("loss", "preset", "tau", "lambda_comp", "lambda_global", "decompose_images"),
        *("label_smoothing", "gap_eps", "log_scale", "clamp_scale", "decay_all"),
        *("batch_size", "accum_freq", "epochs", "warmup", "lr", "wd", "beta1", "beta2", "eps"),
        *("layer_decay", "lr_scheduler", "epochs_cooldown", "ema"),
        *("grad_clip_norm", "on_nonfinite", "precision"),
    ),
    # At most the rounding differs. The user is told, and metrics.jsonl records it.
    "say": (
        *("dataset_type", "image_root", "csv_separator", "csv_img_key", "csv_caption_key"),
        *("skip_missing_images", "follow_links", "max_bad_fraction", "val_frequency"),
        *("val_himo", "patience"),
        *("activation", "vision_heads", "text_heads"),
        *("model", "grad_checkpointing", "channels_last", "compile", "cuda_graph_head"),
        *("exchange", "fsdp", "device", "threads"),
    ),
    # They change speed, and where and how often something is written.
    "ignore": (
        *("workers", "token_cache", "rank_timeout", "logs", "name", "log_every_n_steps"),
        "save_frequency",
        *("save_every_n_steps", "keep_checkpoints", "report_to", "resume", "allow_changes"),
        *("force_warmup", "dry_run"),
    ),
}

_MINIMA: dict[str, float] = {
    "batch_size": 2,
    "eps": 1e-30,  # float32 rounds less than 1e-45 to 0, and Adam then divides 0 by 0
    "rank_timeout": 3.0,
    **dict.fromkeys(("accum_freq", "epochs", "train_num_samples", "vision_heads", "text_heads"), 1),
    "epochs_cooldown": 1,
    **dict.fromkeys(("lock_image_unlocked_groups", "lock_text_unlocked_layers"), 0),
    **dict.fromkeys(("log_every_n_steps", "save_frequency", "val_frequency"), 1),
    **dict.fromkeys(("warmup", "save_every_n_steps", "keep_checkpoints", "held_out"), 0),
    "patience": 0,
    **dict.fromkeys(("lr", "wd", "gap_eps", "grad_clip_norm"), 0.0),
    **dict.fromkeys(("lambda_comp", "lambda_global"), 0.0),
}
_RANGES: dict[str, tuple[float, float]] = {
    "max_bad_fraction": (0.0, 1.0),
    "label_smoothing": (0.0, 1.0),
    "log_scale": (0.0, 20.0),  # float32 logits of 5e8; the released code has 4.6052
    "workers": (0, 1024),  # each is a process
    "threads": (0, 1024),  # torch crashes with many more
    "seed": (0, 2**63 - 1),  # a signed integer of 64 bits
}


# Titles of `himo train --help`, by the first field of each group.
_GROUPS = {
    "train_data": "data",
    "val_data": "validation: retrieval, into metrics.jsonl",
    "recipe": "model",
    "loss": "loss",
    "batch_size": "optimisation",
    "logs": "records",
}


def add_arguments(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Adds --config and a flag for each field of TrainConfig, or for those named.

    A flag that is not given is not in the namespace; its help has its default.
    """
    parser.add_argument("--config", metavar="FILE", help="flags, json or toml; a flag here wins")
    group: argparse._ActionsContainer = parser
    kinds = _kinds()
    for item in dataclasses.fields(TrainConfig):
        if item.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[item.name])
        if names is not None and item.name not in names:
            continue
        text = item.metadata["help"]
        kind = kinds[item.name]
        shown = text if item.default in (None, "") else f"{text} (default: {item.default!r})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown}
        if kind is bool:
            # With --no-..., which switches off what the file of --config switches on.
            options |= {"action": argparse.BooleanOptionalAction, "help": text}
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(flag(item.name), **options)


def from_arguments(arguments: argparse.Namespace, **given: Any) -> TrainConfig:
    """Returns the TrainConfig of parsed flags, then of --config, then of those given.

    Raises:
        HimoError: names a flag that is out of range, or what is wrong in the file of --config.
    """
    kinds = _kinds()
    flags = {name: value for name, value in vars(arguments).items() if name in kinds}
    file = read_config(arguments.config, kinds) if arguments.config is not None else {}
    return TrainConfig(**given | file | flags)


def _kinds() -> dict[str, Any]:
    """The type of each field, without None."""
    hints = typing.get_type_hints(TrainConfig)
    return {item.name: _without_none(hints[item.name]) for item in dataclasses.fields(TrainConfig)}


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _without_none(hint: Any) -> Any:
    parts = typing.get_args(hint)
    return parts[0] if types.NoneType in parts else hint
