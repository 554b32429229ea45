"""Saves and restores everything that the next step of a run depends on, in one checked file."""

import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from himo import sharding
from himo.average import AverageWeights
from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.errors import HimoError
from himo.files import open_regular

_KEY = "himo_training_state"  # metadata: step, sampler, random state, configuration as JSON
_NAME = "state-{step:08d}.safetensors"
_LAST_STEP = 10**12 - 1
_NAMED = re.compile(r"state-[0-9]{8,12}\.safetensors")
_PARTS = {"step": int, "random": list, "sampler": dict, "bad_samples": dict, "settings": dict}


def whole_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AverageWeights | None,
    *,
    keep: bool,
) -> dict[str, Tensor]:
    """The tensors of `save_state`: weights, moments and averages, whole where they are sharded.

    Args:
        keep: whether this rank saves them. Every rank must call it, and the others get {}.
    """
    return sharding.gathered(_tensors(model, optimizer, average), keep=keep)


def _tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: AverageWeights | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield f"model/{name}", tensor
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer/{name}/{key}", value
    if average is not None:
        for name, value in average.state_dict().items():
            yield f"average/{name}", value


def save_state(
    directory: Path, step: int, tensors: dict[str, Tensor], loop: Mapping[str, Any]
) -> Path:
    """Writes state-STEP.safetensors atomically, with the random state, and returns its path.

    Args:
        tensors: as `whole_tensors` returns them.
        loop: what else the loop needs (sampler position, configuration), to be stored as JSON.
    """
    tensors = {**tensors, "random/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda{index}"] = state
    record = {"step": step, "random": random.getstate(), **loop}
    path = directory / _NAME.format(step=step)
    write_safetensors(str(path), tensors, {_KEY: json.dumps(record)})
    return path


@dataclass(frozen=True)
class State:
    """A training state as read from its file; `restore` puts it to use."""

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]  # step, random, and the loop's part from save_state

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.record["step"])


def restore(
    state: State,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AverageWeights | None,
    device: torch.device,
) -> None:
    """Restores model, optimizer, the average of the weights if there is one, and random state.

    An average that the state does not have begins with the weights of the state.

    Raises:
        HimoError: the state is of another model.
        Exception: a part is missing or of another type; see `refuse_damage`.
    """
    tensors = state.tensors

    def below(prefix: str) -> dict[str, Tensor]:
        names = [name for name in tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensors[name] for name in names}

    weights = below("model/")
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    own = model.state_dict()
    expected = {name: sharding.whole_shape(name, tensor) for name, tensor in own.items()}
    differing = sorted(n for n in shapes | expected if shapes.get(n) != expected.get(n))
    if differing:
        raise HimoError(f"{state.path}: is of another model: {', '.join(differing[:5])} differ")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(sharding.part(weights[name], tensor))
    for name, parameter in model.named_parameters():
        if adam := below(f"optimizer/{name}/"):
            # AdamW's step count is on the CPU, or with its weight where one kernel does it all.
            step = adam.pop("step")
            if any(value.shape != expected[name] for value in adam.values()):
                raise HimoError(f"{state.path}: is of another model: the moments of {name} differ")
            moments = {key: sharding.part(value, parameter) for key, value in adam.items()}
            fused = optimizer.defaults.get("fused")
            optimizer.state[parameter] = {"step": step.to(device) if fused else step, **moments}
    if average is not None:
        average.load_state_dict(below("average/"))
    torch.set_rng_state(tensors["random/torch"])
    for index in range(torch.cuda.device_count()):
        if f"random/cuda{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda{index}"], index)
    version, internal, gauss = state.record["random"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def refuse_damage(state: State) -> Iterator[None]:
    """Raises HimoError for the errors that a malformed record leads to in the body."""
    try:
        yield
    except (HimoError, torch.OutOfMemoryError):
        raise
    except (LookupError, ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        raise HimoError(f"{state.path}: damaged: {type(e).__name__}: {str(e)[:80]}") from e


def find_state(resume: str, directory: Path) -> State | None:
    """The state that --resume names; None if it is "latest" and there is none yet.

    Raises:
        HimoError: the path is missing or holds no training state; or the newest file is damaged,
            in which case the newest undamaged one is named.
    """
    if resume != "latest":
        if not Path(resume).exists():
            raise HimoError(f"--resume: expected 'latest' or a training state, got {resume}")
        return _read(Path(resume))
    paths = saved_states(directory)
    if not paths:
        return None
    try:
        return _read(paths[-1])
    except HimoError as error:
        for earlier in reversed(paths[:-1]):
            try:
                _read(earlier)
            except HimoError:
                continue
            raise HimoError(f"{error}; the one before is good: --resume {earlier}") from error
        raise HimoError(f"{error}; there is no earlier one that is good") from error


def saved_states(directory: Path) -> list[Path]:
    """The training states in a directory, oldest first."""
    return sorted((p for p in directory.glob("state-*") if _NAMED.fullmatch(p.name)), key=_step)


def set_aside(directory: Path, step: int) -> list[Path]:
    """Renames the states past a step at which a run resumes; returns their new paths.

    Otherwise `--resume latest` would take one of them, and the run would remove its own states as
    the older ones.
    """
    later = [path for path in saved_states(directory) if _step(path) > step]
    return [path.rename(f"{path}.set-aside") for path in later]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _read(path: Path) -> State:
    with open_regular(path) as file:
        tensors, metadata = read_safetensors(file, str(path))
    if _KEY not in metadata:
        raise HimoError(
            f"{path}: is no training state; to start from a model, use --pretrained {path}"
        )
    try:
        record = json.loads(metadata[_KEY])
    except (RecursionError, ValueError) as error:
        raise HimoError(f"{path}: damaged: {_KEY} is no JSON: {error}") from error
    for name, kind in _PARTS.items():
        if not isinstance(record, dict) or type(record.get(name)) is not kind:
            raise HimoError(f"{path}: damaged: expected {_KEY} with {name}, a {kind.__name__}")
    if not 0 <= record["step"] <= _LAST_STEP:
        raise HimoError(f"{path}: damaged: expected a step from 0 to {_LAST_STEP}")
    return State(path, tensors, record)
