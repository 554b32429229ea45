"""The memory of training: how much is free, how much a step takes, and advice if it runs out."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


def step_bytes(config: CLIPConfig, settings: TrainConfig, batch: int) -> int:
    """About the memory of a training step in float32; `himo plan` counts it exactly, in seconds."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in HiMoCLIP(config).parameters())
    per_parameter = _BYTES_PER_PARAMETER + (0 if settings.ema is None else 4)
    patches = (config.image_resolution // config.vision_patch_size) ** 2 + 1
    saved = 0.0
    for layers, width, tokens in (
        (config.vision_layers, config.vision_width, patches),
        (config.text_layers, config.text_width, config.context_length),
    ):
        # Recomputed blocks save their input, and one block at a time saves the rest.
        blocks = _SAVED * (layers - 1) + _SAVED_LAST
        if settings.grad_checkpointing:
            blocks = layers + _SAVED
        saved += 4 * blocks * width * tokens
    return per_parameter * parameters + int(batch * saved)


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
