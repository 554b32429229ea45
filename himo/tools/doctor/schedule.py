"""The schedule of a training run and the host memory that it takes."""

import torch

from himo import recipes
from himo.config import TrainConfig
from himo.memory import free_memory, step_bytes
from himo.model import CLIPConfig
from himo.tools.doctor.check import Check, size

# A worker's own memory: a photo of 24 megapixels takes 72 MB decoded, and as much while it is cut.
_WORKER = 144 << 20


def schedule(settings: TrainConfig, pairs: int) -> Check:
    """The steps of the run and its learning rate."""
    steps = recipes.total_steps(settings, pairs)
    together = settings.batch_size * settings.accum_freq
    if not steps:
        few = f"no step: {pairs:,} of the {together} pairs of a batch"
        return Check("schedule", "problem", f"{few}; --keep-last-batch trains on fewer")
    found = (
        f"{steps:,} steps of {together} in {settings.epochs} epochs, --lr {settings.lr:g} after "
        f"--warmup {settings.warmup}"
    )
    if (left_out := pairs % together) and not settings.keep_last_batch:
        found += f", {left_out} of {pairs:,} pairs left out of an epoch"
    if doubts := recipes.doubts(settings, steps):
        refused = settings.warmup >= steps and not settings.force_warmup  # by `himo train`
        text = f"{found}; {'; '.join(doubts)}"
        return Check("schedule", "problem" if refused else "warning", text)
    return Check("schedule", "ok", found)


def host_memory(settings: TrainConfig, config: CLIPConfig, device: torch.device) -> Check:
    """The memory of this machine against the workers and, on a CPU, a step."""
    # With a GPU the host holds the model and AdamW's moments while they are saved.
    batch = settings.batch_size if device.type == "cpu" else 0
    step, workers = step_bytes(config, settings, batch), settings.workers * _WORKER
    free = free_memory(torch.device("cpu"))
    what = f"a step of {batch} pairs" if batch else "the model and its optimizer"
    found = f"{size(free)} free, {what} and {settings.workers} workers take about "
    found += size(step + workers)
    if 0 < free < step + workers:
        advice = "a smaller --batch-size, fewer --workers, or --grad-checkpointing takes less"
        return Check("host memory", "problem", f"{found}: {advice}")
    return Check("host memory", "ok", found)
