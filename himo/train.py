"""`himo train`: the training loop. himo/run.py sets up the run."""

import argparse
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from himo import config, parallel, run_folder, sharding
from himo.config import TrainConfig
from himo.data import Sample, worker_deaths
from himo.dry_run import check_writable, rehearse
from himo.errors import note
from himo.memory import out_of_memory_advice
from himo.model import text_lengths
from himo.objective import Objective, rank_doubt
from himo.optimizer import (
    MAX_LOG_SCALE,
    clamp_temperature,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from himo.parallel import Ranks
from himo.run import TrainingRun, build_model, open_run

# Import these to write your own trainer.
__all__ = [
    "MAX_LOG_SCALE",
    "Objective",
    "add_arguments",
    "build_model",
    "clamp_temperature",
    "learning_rate",
    "make_optimizer",
    "run",
    "train",
]

add_arguments = config.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """Trains with these flags; returns the exit status."""
    settings = config.from_arguments(arguments)
    finished = train(settings)
    return 0 if finished else 130  # the status of an interrupted program


def train(settings: TrainConfig) -> bool:
    """Runs or resumes a training run; returns False if a signal stopped it.

    Writes config.json, metrics.jsonl and checkpoints/ in settings.folder. The folder is locked:
    no other run can write there at the same time. With --dry-run nothing is written or locked.

    Raises:
        HimoError: bad data or settings, a damaged checkpoint, a checkpoint of another run, a folder
            in use, a loss that is not finite, a data loader worker that died, too little memory.
            Under torchrun the process prints the reason and exits instead.
    """
    # The recipe may choose the model, and must not rename the folder.
    settings = dataclasses.replace(settings, name=settings.run_name)
    with (
        parallel.join(settings.device, settings.rank_timeout) as ranks,
        worker_deaths(),
        out_of_memory_advice(),
        _folder_of(settings) if ranks.main else nullcontext(),
    ):
        # The run is local to _train, so it is freed before the process group is destroyed.
        return _train(settings, ranks)


def _folder_of(settings: TrainConfig) -> AbstractContextManager[None]:
    if settings.dry_run:
        check_writable(settings.folder)
        return nullcontext()
    return run_folder.owned(settings.folder)


def _train(settings: TrainConfig, ranks: Ranks) -> bool:
    run = open_run(settings, ranks)
    if settings.dry_run:
        rehearse(run, _step)
        return True
    try:
        if not _take_steps(run):
            return False
    finally:
        if run.reports is not None:
            run.reports.close()
    run.report_end()
    return True


def _take_steps(run: TrainingRun) -> bool:
    """Takes the remaining steps, logs and saves; returns False if a signal stopped the run."""
    settings, log = run.settings, run.log
    run.objective.train()
    first_epoch = run.sampler.epoch
    with _stop_requests() as stop, _progress(run) as bar:
        for epoch in range(first_epoch, settings.epochs):
            if epoch != first_epoch:
                run.sampler.set_epoch(epoch)
            bar.set_description(f"epoch {epoch + 1}/{settings.epochs}", refresh=False)
            ended = time.perf_counter()
            for batch in run.batches():
                data_time_s = time.perf_counter() - ended
                lr = learning_rate(run.step, run.total_steps, settings)
                is_stopping = run.ranks.any(stop.requested)
                outputs, grad_norm, is_finite = _step(run, batch, lr)
                log.add_time(data_time_s, time.perf_counter() - ended)
                if is_finite:
                    log.add(outputs["loss"], grad_norm)
                else:
                    log.skip(run.step, grad_norm)
                validated = _validated(run)
                if is_finite and (validated is not None or _is_logged(run)):
                    outputs |= validated or {}
                    epochs_done = run.step / run.steps_per_epoch
                    scale = sharding.whole(run.model.logit_scale)
                    line = log.write(run.step, epochs_done, lr, scale, outputs)
                    if run.reports is not None:
                        run.reports.write(line)
                    _check_rank(run, line["rank"])
                    loss, data_s = f"{line['loss']:.3f}", f"{line['data_time_s']:.3f}"
                    bar.set_postfix(loss=loss, data_s=data_s, refresh=False)
                bar.update()
                if is_stopping():
                    run.save()
                    if run.ranks.main:
                        tqdm.write(f"stopped at step {run.step}; go on with --resume latest")
                    return False
                if _is_multiple(run.step, settings.save_every_n_steps):
                    run.save()
                ended = time.perf_counter()
            log.check_finite(run.step)
            stops = _has_lost_patience(run)
            is_last = stops or epoch + 1 == settings.epochs
            if is_last or _is_multiple(epoch + 1, settings.save_frequency):
                run.save(ends_epoch=True)
            if stops:
                break
    return True


def _step(run: TrainingRun, batch: Sample, lr: float) -> tuple[dict[str, Any], Tensor, bool]:
    """Takes one optimizer step; returns (outputs of the objective, gradient norm, is finite).

    With --on-nonfinite skip or --precision amp, a gradient that is not finite changes no weight.
    Otherwise the norm is not checked, and the third value is always True.
    """
    settings, optimizer, scaler = run.settings, run.optimizer, run.objective.scaler
    lengths = text_lengths(batch.tokens)  # on the CPU: no sync
    max_length = max(lengths, default=1)
    images = batch.image.to(run.device, non_blocking=True)
    tokens = batch.tokens.to(run.device, non_blocking=True)
    set_learning_rate(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    size = settings.batch_size
    outputs = run.objective.backward(images, tokens, max_length, size, lengths)
    scaler.unscale_(optimizer)
    limit = math.inf if settings.grad_clip_norm is None else settings.grad_clip_norm
    clip = sharding.clip_grad_norm_ if settings.fsdp else nn.utils.clip_grad_norm_
    grad_norm = clip(run.model.parameters(), limit)
    # Gradients are averaged by now, so all ranks decide alike. The check synchronises the host.
    is_checked = settings.on_nonfinite == "skip" or scaler.is_enabled()
    is_finite = not is_checked or bool(torch.isfinite(grad_norm))
    run.step += 1
    if is_finite:
        scaler.step(optimizer)
        if settings.clamp_scale:
            clamp_temperature(run.model)
        if run.average is not None:
            run.average.update()
    scaler.update()
    return outputs, grad_norm, is_finite


def _validated(run: TrainingRun) -> dict[str, Any] | None:
    """Measures, prints and returns the validation if it is due after this step, else None.

    Saves the model if it is the best so far. Every rank must call it; rank 0 measures, and the
    others get {}.
    """
    every = run.steps_per_epoch * run.settings.val_frequency
    is_due = _is_multiple(run.step, every) or run.step == run.total_steps
    if not run.settings.validates or not is_due:
        return None
    run.log.check_finite(run.step)
    epochs = run.step / run.steps_per_epoch
    with run.whole_model() as model:
        if run.validation is None or model is None:
            return {}
        values = run.validation.measure(model)
        line = f"epoch {epochs:g}: {run.validation.line(values)}"
        if run.best.is_beaten(run.step, epochs, values):
            run.save_model(model, run_folder.BEST)
            line += ", the best so far"
    tqdm.write(line)
    return values | {"predictions": run.validation.predictions}


def _has_lost_patience(run: TrainingRun) -> bool:
    """Whether the model has not improved for too long. Every rank must call it; rank 0 knows."""
    patience, since = run.settings.patience, run.best.since
    if not patience or not run.ranks.any(run.ranks.main and since >= patience)():
        return False
    if run.ranks.main:
        tqdm.write(f"no better R@1 in {since} validations, --patience {patience}: the run ends")
    return True


def _check_rank(run: TrainingRun, rank: int | None) -> None:
    """Warns once, after the warm-up, if HiDe keeps too few or too many directions."""
    is_early = run.step < min(run.settings.warmup, run.total_steps)
    if rank is None or run.settings.lambda_comp == 0 or run.rank_checked or is_early:
        return
    run.rank_checked = True
    doubt = rank_doubt(rank, run.log.pairs_per_step)
    if doubt is not None and run.ranks.main:
        with tqdm.external_write_mode():
            note(f"step {run.step}: {doubt}")


def _is_logged(run: TrainingRun) -> bool:
    every = run.settings.log_every_n_steps
    return _is_multiple(run.step, every) or run.step in (1, run.total_steps)


def _is_multiple(number: int, every: int) -> bool:
    return every > 0 and number % every == 0  # 0 means never


def _progress(run: TrainingRun) -> "tqdm[Any]":
    # A log file keeps every redraw of the bar, so it is redrawn only twice a minute there.
    every_s = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=run.total_steps,
        initial=run.step,
        disable=not run.ranks.main,
        unit="step",
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=every_s,
        maxinterval=max(10.0, every_s),
    )


@contextmanager
def _stop_requests() -> Iterator[SimpleNamespace]:
    # SIGINT and SIGTERM end the run after the current step, with a checkpoint.
    stop = SimpleNamespace(requested=False)

    def request(number: int, frame: Any) -> None:
        if stop.requested:  # the second signal ends the process at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.requested = True

    previous = {n: signal.signal(n, request) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
