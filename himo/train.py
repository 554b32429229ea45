"""`himo train`: one flat loop from captioned images to a checkpoint."""

import argparse
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from himo import checkpoint, config, parallel, resume, run_folder, training_state
from himo.config import TrainConfig
from himo.data import (
    BadSamples,
    BatchLoader,
    CaptionedImages,
    EpochSampler,
    Sample,
    SampleIndex,
    make_loader,
    open_dataset,
    worker_deaths,
)
from himo.device import usable_device
from himo.errors import HimoError
from himo.model import HiMoCLIP, longest_text, named_config
from himo.objective import Objective
from himo.parallel import Ranks
from himo.precision import resolve
from himo.tokenizer import tokenize
from himo.training_log import TrainingLog
from himo.transforms import Preprocess
from himo.validation import Validation

MAX_LOG_SCALE = math.log(100)  # CLIP's limit: a larger multiplier made its training unstable

add_arguments = config.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Trains as the flags say; returns the exit status."""
    settings = config.from_arguments(arguments)
    finished = train(settings)
    return 0 if finished else 130  # the status of an interrupted program


def train(settings: TrainConfig) -> bool:
    """Runs or resumes a training run; returns False if it was stopped by a signal.

    Writes config.json, metrics.jsonl and checkpoints/ in settings.folder, which no other run may
    write meanwhile.

    Raises:
        HimoError: bad data or settings, a damaged checkpoint or that of another run, a folder in
            use, a loss that is not finite, a worker of the loader that died. Under torchrun the
            process ends instead, and says why.
    """
    with (
        parallel.join(settings.device, settings.rank_timeout) as ranks,
        worker_deaths(),
        run_folder.owned(settings.folder) if ranks.main else nullcontext(),
    ):
        return _train(settings, ranks)


def _train(settings: TrainConfig, ranks: Ranks) -> bool:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = usable_device(ranks.device(settings.device))
    precision, said = resolve(settings.precision, device, ranks)
    settings = dataclasses.replace(settings, precision=precision)
    if said and ranks.main:
        print(f"himo: note: {said}", file=sys.stderr)
    with ranks.main_first():  # which writes the index that the others read
        index, held_out = open_data(settings, ranks)
    model = build_model(settings, device)
    preprocess = Preprocess.of(model.config, settings.image_mode)
    validation = None
    if held_out is not None and ranks.main:
        validation = Validation(
            held_out,
            preprocess,
            batch_size=settings.batch_size,
            workers=settings.workers,
            max_bad_fraction=settings.max_bad_fraction,
        )
    dataset = CaptionedImages(
        index,
        preprocess,
        partial(tokenize, context_length=model.context_length),
        seed=settings.seed,
        short_captions=settings.short_captions,
    )
    sampler = EpochSampler(
        len(dataset),
        settings.batch_size * settings.accum_freq,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        drop_last=not settings.keep_last_batch,
    )
    pairs_per_step = sampler.batch_size * ranks.size
    loader = make_loader(
        dataset,
        sampler,
        workers=settings.workers,
        seed=settings.seed,
        max_bad_fraction=settings.max_bad_fraction,
        pin_memory=device.type == "cuda",
    )
    objective = Objective(model, settings, ranks)
    optimizer = make_optimizer(model, settings)
    steps_per_epoch = sampler.global_batches()

    directory, made_with = settings.folder, {}
    if ranks.main:
        val_data = held_out if settings.val_data is not None else None
        made_with = resume.record(settings, ranks.size, model.config, index, val_data)
    step = _open_run(settings, made_with, model, optimizer, sampler, loader.bad, device, ranks)
    # From here on: a run that goes on with more epochs than it began with has other steps behind.
    epochs_left = settings.epochs - sampler.epoch - 1
    total_steps = step + sampler.global_batches() + steps_per_epoch * epochs_left
    if settings.warmup >= total_steps and ranks.main:
        print(
            f"himo: note: --warmup {settings.warmup} takes longer than the {total_steps} steps of "
            f"this run, whose learning rate stays below --lr {settings.lr:g}",
            file=sys.stderr,
        )
    if ranks.main:
        print(
            f"{directory}: {len(dataset)} pairs, {total_steps} steps of {pairs_per_step}, "
            f"{settings.loss} loss, {_count(model)} parameters on {device}"
            + (f", {ranks.size} processes" if ranks.size > 1 else "")
            + (f", {validation.description()}" if validation is not None else "")
        )
        if 0 < step < total_steps:
            rate = learning_rate(step, total_steps, settings)
            print(f"{directory}: goes on after step {step}, at a learning rate of {rate:.3g}")
    metrics = TrainingLog(directory / run_folder.METRICS, pairs_per_step, ranks)

    def save(final: bool) -> None:
        bad = [state["reasons"] for state in ranks.gather(loader.bad.state_dict())]
        if not ranks.main:
            return
        loop = {
            "sampler": sampler.state_dict(),
            "bad_samples": {"reasons": {k: v for reasons in bad for k, v in reasons.items()}},
            **made_with,
        }
        checkpoints = directory / run_folder.CHECKPOINTS
        if final:
            name = f"epoch_{sampler.epoch + 1}.safetensors"
            training = {"step": step, **dataclasses.asdict(settings)}
            checkpoint.save(model, checkpoints / name, metadata={"training": training})
        training_state.save_state(checkpoints, step, model, optimizer, loop)
        keep = settings.keep_checkpoints
        for old in training_state.saved_states(checkpoints)[:-keep] if keep else []:
            old.unlink()

    objective.train()
    first_epoch = sampler.epoch
    with _stop_requests() as stop, _progress(step, total_steps, ranks) as bar:
        for epoch in range(first_epoch, settings.epochs):
            if epoch != first_epoch:
                sampler.set_epoch(epoch)
            ended = time.perf_counter()
            for batch in _same_number(loader, sampler.global_batches(), model):
                data_time_s = time.perf_counter() - ended
                max_length = longest_text(batch.tokens)  # on the CPU: no sync
                images = batch.image.to(device, non_blocking=True)
                tokens = batch.tokens.to(device, non_blocking=True)

                lr = learning_rate(step, total_steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                stopping = ranks.any(stop.requested)
                optimizer.zero_grad(set_to_none=True)
                outputs = objective.backward(images, tokens, max_length, settings.batch_size)
                limit = settings.grad_clip_norm
                grad_norm = nn.utils.clip_grad_norm_(
                    model.parameters(), math.inf if limit is None else limit
                )
                # The same norm on each rank, after the mean. Asking makes the host wait.
                skipped = settings.on_nonfinite == "skip" and not torch.isfinite(grad_norm)
                step += 1
                if not skipped:
                    optimizer.step()
                    if settings.preset == "paper":  # the released code does not clamp
                        clamp_temperature(model)
                metrics.add_time(data_time_s, time.perf_counter() - ended)
                if skipped:
                    metrics.skip(step, grad_norm)
                else:
                    metrics.add(outputs["loss"], grad_norm)
                found = {}
                every = steps_per_epoch * settings.val_frequency
                if validation is not None and (step % every == 0 or step == total_steps):
                    metrics.check_finite(step)
                    found = validation.measure(model)
                log = found or step % settings.log_every_n_steps == 0 or step in (1, total_steps)
                if log and not skipped:
                    outputs |= found
                    epoch_now = step / steps_per_epoch
                    line = metrics.write(step, epoch_now, lr, model.logit_scale, outputs)
                    bar.set_postfix(
                        loss=f"{line['loss']:.3f}",
                        data_s=f"{line['data_time_s']:.3f}",
                        refresh=False,
                    )
                bar.update()
                if stopping.result():
                    metrics.check_finite(step)
                    save(final=False)
                    if ranks.main:
                        tqdm.write(f"stopped at step {step}; go on with --resume latest")
                    return False
                every = settings.save_every_n_steps
                if every and step % every == 0:
                    metrics.check_finite(step)
                    save(final=False)
                ended = time.perf_counter()
            metrics.check_finite(step)
            last = epoch + 1 == settings.epochs
            if last or (epoch + 1) % settings.save_frequency == 0:
                save(final=True)
    for reasons in [state["reasons"] for state in ranks.gather(loader.bad.state_dict())]:
        loader.bad.reasons |= reasons
    if ranks.main:
        if loader.bad.reasons:
            print(loader.bad.summary())
        checkpoint_path = (
            directory / run_folder.CHECKPOINTS / f"epoch_{settings.epochs}.safetensors"
        )
        print(f"{directory}: done, {checkpoint_path}")
    return True


def _same_number(loader: BatchLoader, steps: int, model: HiMoCLIP) -> Iterator[Sample]:
    # So many batches on every rank: what is left at an epoch's end may give some ranks none, and
    # those take part in the step with no rows.
    number = 0
    for number, batch in enumerate(loader, 1):  # noqa: B007
        yield batch
    for _ in range(steps - number):
        size = model.visual.input_resolution
        none = torch.zeros(0, dtype=torch.int64)
        image = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        yield Sample(image, torch.zeros(0, model.context_length, dtype=torch.int64), none, none)


def learning_rate(step: int, total_steps: int, settings: TrainConfig) -> float:
    """The rate of the step-th step, from 0: linear over warmup steps, then a cosine to 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, total_steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clamp_temperature(model: HiMoCLIP) -> None:
    """Keeps the logit multiplier from 1 to 100, as CLIP does after each step."""
    model.logit_scale.clamp_(0, MAX_LOG_SCALE)


def _open_run(
    settings: TrainConfig,
    made_with: dict[str, Any],
    model: HiMoCLIP,
    optimizer: torch.optim.Optimizer,
    sampler: EpochSampler,
    bad: BadSamples,
    device: torch.device,
    ranks: Ranks,
) -> int:
    # Takes up the run where its checkpoint left it; returns the steps already done.
    state, changes = run_folder.saved_state(settings), []
    if state is not None:
        with training_state.refuse_damage(state):
            if ranks.main:
                changes = resume.check(state.record, made_with, settings.allowed, state.path)
            sampler.load_state_dict(state.record["sampler"])
            bad.load_state_dict(state.record["bad_samples"])
            training_state.restore(state, model, optimizer, device)
        if sampler.epoch >= settings.epochs:
            done = sampler.epoch + 1
            raise HimoError(
                f"--epochs: expected at least {done}, begun before, got {settings.epochs}"
            )
    ranks.barrier()  # every rank has seen what was there before
    if ranks.main:
        run_folder.start(settings, state, changes)
    return 0 if state is None else state.step


def open_data(settings: TrainConfig, ranks: Ranks) -> tuple[SampleIndex, SampleIndex | None]:
    """The pairs to train on, and those to validate on; says what was left out."""

    def opened(source: str) -> SampleIndex:
        index = open_dataset(
            source,
            settings.dataset_type,
            image_root=settings.image_root,
            image_key=settings.csv_img_key,
            caption_key=settings.csv_caption_key,
            separator=settings.csv_separator,
            skip_missing_images=settings.skip_missing_images,
            follow_links=settings.follow_links,
            max_bad_fraction=settings.max_bad_fraction,
        )
        if ranks.main:
            print(index.report.summary())
        return index

    index = opened(settings.train_data)
    held_out = opened(settings.val_data) if settings.val_data is not None else None
    first, count = settings.held_out, settings.train_num_samples
    if first:
        if first >= len(index):
            raise HimoError(f"--held-out: expected fewer than {len(index)} pairs, got {first}")
        held_out = index[:first]
    if count is not None and first + count > len(index):
        raise HimoError(
            f"--train-num-samples: expected at most {len(index) - first} pairs, got {count}"
        )
    if first or count is not None:
        index = index[first:] if count is None else index[first : first + count]
    return index, held_out


def build_model(settings: TrainConfig, device: torch.device) -> HiMoCLIP:
    """The model that a run starts from; HimoError for an unknown name or a bad checkpoint."""
    if settings.pretrained is not None:
        given = {name: getattr(settings, name) for name in checkpoint.CHOICES}
        model, _ = checkpoint.load(settings.pretrained, device="cpu", stretch=True, **given)
    else:
        model = HiMoCLIP(named_config(settings.model))
    if settings.preset == "official" and settings.loss == "himo":
        nn.init.constant_(model.logit_scale, MAX_LOG_SCALE)
    if settings.lock_image:
        model.lock_image_tower()
    if settings.lock_text:
        model.lock_text_tower()
    model.set_grad_checkpointing(settings.grad_checkpointing)
    model.to(device)
    if settings.compile:  # in place: the names of the parameters stay
        model.visual.compile()
        model.transformer.compile(dynamic=True)  # the longest caption of a batch varies
    return model


def make_optimizer(model: HiMoCLIP, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is not frozen."""
    # No decay on norms, biases, embeddings of one vector and logit_scale: all below two dimensions.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings.wd},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps
    )


def _count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


def _progress(step: int, total_steps: int, ranks: Ranks) -> "tqdm[Any]":
    # In a log file every drawing stays: there the bar is drawn twice a minute.
    every_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total_steps,
        initial=step,
        disable=not ranks.main,
        unit="step",
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=every_s,
        maxinterval=max(10.0, every_s),
    )


class _Stop:
    requested = False


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    # SIGINT and SIGTERM end the run after the current step, with a checkpoint.
    stop = _Stop()

    def request(number: int, frame: Any) -> None:
        if stop.requested:  # a second one means now
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.requested = True

    previous = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
