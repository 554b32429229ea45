"""The memory of training: how much is free, how much a step takes, and advice if it runs out."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from himo.clip_config import CLIPConfig
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.model import HiMoCLIP
from himo_kernels.memory import available_memory

# Numbers that a block saves for its backward, for each token and channel: its input, two
# normalised inputs, query, key, value, attention, its projection, and 4 + 4 of the MLP.
_SAVED = 16.5
# The last block computes one position of each row, but key and value of all, from the input.
_SAVED_LAST = 4
# Weight, gradient, and the two moments of AdamW, in float32.
_BYTES_PER_PARAMETER = 4 * 4
# With --fsdp, of the parameters outside the blocks: the whole weight, the whole gradient, and the
# buffer from which the gradient is reduced.
_GATHERED = 3 * 4
_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")  # in a RuntimeError


def free_memory(device: torch.device) -> int:
    """The bytes that this process may take on the device; 0 if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each system
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def step_bytes(config: CLIPConfig, settings: TrainConfig, batch: int, processes: int = 1) -> int:
    """About the memory of a training step in float32; `himo plan` counts it exactly, in seconds.

    Args:
        batch: pairs of one process at a time.
        processes: of the run. With --fsdp they share the weights out, and process 0 gathers them to
            save them; otherwise each holds them all, and DDP's buckets as large as the gradients.
    """
    with torch.device("meta"):
        model = HiMoCLIP(config)
    parameters, blocks = _numbers(model), _numbers(model.visual.transformer, model.transformer)
    per_parameter = _BYTES_PER_PARAMETER + (0 if settings.ema is None else 4)
    shared, least = per_parameter * parameters, 0
    patches = (config.image_resolution // config.vision_patch_size) ** 2 + 1
    if settings.fsdp and processes > 1:
        shared //= processes
        least = shared + 4 * parameters
        shared += _GATHERED * (parameters - blocks)
    elif processes > 1:
        shared += 4 * parameters
    saved = 0.0
    for layers, width, tokens in (
        (config.vision_layers, config.vision_width, patches),
        (config.text_layers, config.text_width, config.context_length),
    ):
        # Recomputed blocks save their input, and one block at a time saves the rest.
        of_layers = _SAVED * (layers - 1) + _SAVED_LAST
        if settings.grad_checkpointing:
            of_layers = layers + _SAVED
        saved += 4 * of_layers * width * tokens
    return max(shared + int(batch * saved), least)


def _numbers(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@contextmanager
def out_of_memory_advice() -> Iterator[None]:
    """Raises HimoError, with the flags that take less, where memory runs out in the body."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not any(s in str(error) for s in _SIGNS):
            raise
        raise HimoError(
            "out of memory: a smaller --batch-size takes less, and --accum-freq keeps the pairs "
            "that are contrasted together; so does --grad-checkpointing, for more time; "
            "`himo plan` counts what fits"
        ) from error
