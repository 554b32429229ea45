"""A training run on disk: everything that its next step depends on, in one checked file."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.errors import HimoError
from himo.files import open_regular

_KEY = "himo_training_state"  # metadata: step, sampler, random state, configuration as JSON
_NAME = "state-{step:08d}.safetensors"


def save_state(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loop: Mapping[str, Any],
) -> Path:
    """Writes state-STEP.safetensors atomically and returns its path.

    Args:
        loop: what else the loop needs (sampler position, configuration), as JSON.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors["random/torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda{index}"] = state
    record = {"step": step, "random": random.getstate(), **loop}
    path = directory / _NAME.format(step=step)
    write_safetensors(str(path), tensors, {_KEY: json.dumps(record)})
    return path


def load_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, Any]:
    """Restores model, optimizer and random state from path; returns step and loop.

    Raises:
        HimoError: the file is damaged, holds no training state, or that of another model.
    """
    tensors, record = _read(path)
    model_state = {
        name.removeprefix("model/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("model/")
    }
    expected = model.state_dict()
    if {n: t.shape for n, t in model_state.items()} != {n: t.shape for n, t in expected.items()}:
        differing = sorted(
            name
            for name in model_state.keys() | expected.keys()
            if name not in expected
            or name not in model_state
            or model_state[name].shape != expected[name].shape
        )
        raise HimoError(f"{path}: is of another model: {', '.join(differing[:5])} differ")
    model.load_state_dict(model_state)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer/{name}/"
        state = {
            # AdamW keeps its step count on the CPU.
            key.removeprefix(prefix): value if value.dim() == 0 else value.to(device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        if state:
            optimizer.state[parameter] = state
    torch.set_rng_state(tensors["random/torch"])
    for index in range(torch.cuda.device_count()):
        if f"random/cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda{index}"], index)
    version, internal, gauss = record.pop("random")
    random.setstate((version, tuple(internal), gauss))
    return record


def find_state(resume: str, directory: Path) -> Path | None:
    """The file that --resume means; None if it is "latest" and there is none yet.

    Raises:
        HimoError: the path is missing; or the newest file is damaged, in which case the newest
            undamaged one is named.
    """
    if resume != "latest":
        if not Path(resume).exists():
            raise HimoError(f"--resume: expected 'latest' or a training state, got {resume}")
        return Path(resume)
    states = saved_states(directory)
    if not states:
        return None
    try:
        _read(states[-1])
    except HimoError as error:
        for earlier in reversed(states[:-1]):
            try:
                _read(earlier)
            except HimoError:
                continue
            raise HimoError(f"{error}; the one before is good: --resume {earlier}") from error
        raise HimoError(f"{error}; there is no earlier one that is good") from error
    return states[-1]


def saved_states(directory: Path) -> list[Path]:
    """The training states in a directory, oldest first."""
    return sorted(directory.glob(_NAME.replace("{step:08d}", "*")))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with open_regular(path) as file:
        tensors, metadata = read_safetensors(file, str(path))
    if _KEY not in metadata:
        raise HimoError(
            f"{path}: is no training state; to start from a model, use --pretrained {path}"
        )
    return tensors, json.loads(metadata[_KEY])
