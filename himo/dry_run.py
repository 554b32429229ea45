"""`himo train --dry-run`: two steps of a run that writes nothing, with their time and memory."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from himo.data import Sample
from himo.errors import HimoError
from himo.memory import peak_memory
from himo.optimizer import learning_rate
from himo.run import TrainingRun, trained_parameters

Step = Callable[[TrainingRun, Sample, float], tuple[dict[str, Any], Tensor, bool]]
_GIB = 1 << 30


def rehearse(run: TrainingRun, take_step: Step) -> None:
    """Takes two steps on the first batch, and prints the plan of the run. Every rank must call it.

    The second step has the optimizer's state in memory, as every later one.

    Args:
        take_step: as `himo.train` takes a step.

    Raises:
        HimoError: a loss or gradient that is not finite.
    """
    if run.step == run.total_steps:
        if run.ranks.main:
            print(f"{run.settings.folder}: dry run, no step is left after step {run.step}")
        return
    if not run.sampler.global_batches():  # resumed at the end of an epoch
        run.sampler.set_epoch(run.sampler.epoch + 1)
    run.objective.train()
    began = time.perf_counter()
    batch = next(iter(run.batches()))
    read_s = time.perf_counter() - began
    first: dict[str, Any] = {}
    for _ in range(2):
        began = time.perf_counter()
        lr = learning_rate(run.step, run.total_steps, run.settings)
        outputs, grad_norm, is_finite = take_step(run, batch, lr)
        if is_finite:
            run.log.add(outputs["loss"], grad_norm)
            run.log.check_finite(run.step)
        first = first or outputs | {"grad_norm": grad_norm}
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        step_s = time.perf_counter() - began
    loss = float(run.ranks.mean(first["loss"].detach()))
    peak = max(run.ranks.gather(peak_memory(run.device)))
    if run.ranks.main:
        rank = "" if first["rank"] is None else f", HiDe keeps R = {int(first['rank'])} directions"
        where = "of the process" if run.device.type == "cpu" else "on the GPU"
        rows = {
            "trains": _trained(run),
            "rate": _schedule(run),
            "first step": f"loss {loss:.4g}, gradient norm {float(first['grad_norm']):.3g}{rank}",
            "time": f"{step_s:.3g} s a step, {read_s:.3g} s for its pairs before the first; "
            f"{_duration(step_s * (run.total_steps - run.step + 2))} of steps",
            "memory": f"{peak / _GIB:.2f} GiB {where} at its peak",
        }
        lines = [f"  {name:<12}{text}" for name, text in rows.items()]
        print("\n".join([f"{run.settings.folder}: dry run, nothing is written there", *lines]))


def check_writable(folder: Path) -> None:
    """HimoError if the folder of the run could not be made or written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise HimoError(f"{folder}: cannot be written: {nearest} is no folder one may write")


def _trained(run: TrainingRun) -> str:
    groups = {group["lr_scale"] for group in run.optimizer.param_groups}
    shares = f", at {min(groups):.3g} to 1 of the rate" if len(groups) > 1 else ""
    average = "" if run.average is None else f", with an average of decay {run.average.decay:g}"
    return f"{trained_parameters(run.model)} in {run.settings.precision}{shares}{average}"


def _schedule(run: TrainingRun) -> str:
    settings, total = run.settings, run.total_steps
    after = {
        "cosine": f"then a cosine to 0 at step {total}",
        "const": f"then the same to step {total}",
        "const-cooldown": f"the same, and in the last {settings.epochs_cooldown} of "
        f"{settings.epochs} epochs a line to 0 at step {total}",
    }[settings.lr_scheduler]
    return f"{settings.lr:g} after {settings.warmup} steps of warm-up, {after}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
