"""A training step: what the host waits for, what goes to the device, and the layout of images."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clip_cases import SMALL, random_model, tokens_of_lengths
from torch import Tensor
from torch.overrides import TorchFunctionMode

from himo.average import AverageWeights
from himo.config import TrainConfig
from himo.data import Sample
from himo.model import text_lengths
from himo.objective import Objective
from himo.optimizer import make_optimizer
from himo.train import _step
from himo.training_log import TrainingLog

LENGTHS = [5, 9, 60, 17, 248, 33, 16, 40]
DEVICE = torch.device("meta")  # has no values: whatever reads one raises


@pytest.fixture
def no_autocast(monkeypatch):
    """The device has no autocast, not even one that is switched off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def settings_of(**given: Any) -> TrainConfig:
    values = {"batch_size": 8, "lr": 1e-3, "wd": 0.1, "warmup": 0, "clamp_scale": True}
    return TrainConfig(train_data="x", **values | given)


def batch_of(generator: torch.Generator) -> Sample:
    images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    row = torch.arange(8)
    return Sample(images, tokens_of_lengths(SMALL, LENGTHS, generator), row, row)


def run_of(settings: TrainConfig, generator: torch.Generator) -> Any:
    """What a step takes of a run, on the device."""
    model = random_model(SMALL, generator).to(DEVICE)
    return SimpleNamespace(
        settings=settings,
        device=DEVICE,
        model=model,
        objective=Objective(model, settings),
        optimizer=make_optimizer(model, settings),
        average=None if settings.ema is None else AverageWeights(model, settings.ema),
        step=0,
    )


class Copies(TorchFunctionMode):
    """Records what goes from the host to the device, and whether the host waits for it."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.dtype, tuple[int, ...], bool]] = []

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device == DEVICE:
            named = kwargs or {}
            if op in (torch.tensor, torch.as_tensor):
                waits = True
            elif args and isinstance(args[0], Tensor) and args[0].device.type == "cpu":
                waits = not named.get("non_blocking", False)
            else:
                return result
            self.seen.append((result.dtype, tuple(result.shape), waits))
        return result


@pytest.mark.parametrize(
    "given",
    [{}, {"ema": 0.9, "grad_clip_norm": 1.0, "layer_decay": 0.5}, {"loss": "clip"}],
    ids=["plain", "average", "clip"],
)
def test_a_step_reads_no_value_and_waits_for_no_copy(given, generator, no_autocast):
    run, batch = run_of(settings_of(**given), generator), batch_of(generator)
    log = TrainingLog(run.settings.folder)
    with Copies() as copies:
        for _ in range(2):
            outputs, norm, _ = _step(run, batch, 1e-3)
            log.add(outputs["loss"], norm)
    assert outputs["loss"].device == norm.device == DEVICE and run.step == 2
    expected = [
        (torch.uint8, (8, 3, 32, 32), False),  # images travel as bytes
        (torch.int64, (8, 248), False),
        (torch.float32, (3, 3, 1, 1), False),
        (torch.int64, (3, 8), False),  # where each caption is in the packed batch
    ]
    assert copies.seen == 2 * expected


def test_a_step_that_may_be_skipped_reads_its_gradient(generator, no_autocast):
    run = run_of(settings_of(on_nonfinite="skip"), generator)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        _step(run, batch_of(generator), 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_a_channels_last_step_is_that_of_the_other_layout(precision, generator):
    model, batch = random_model(SMALL, generator), batch_of(generator)
    layouts, steps = [], []
    model.visual.conv1.register_forward_pre_hook(
        lambda _, given: layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    for channels_last in (False, True):
        settings = settings_of(precision=precision, channels_last=channels_last)
        model.zero_grad(set_to_none=True)
        outputs = Objective(model, settings).backward(
            batch.image, batch.tokens, 248, 8, text_lengths(batch.tokens)
        )
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        steps.append({"loss": outputs["loss"].detach(), **grads})
    assert layouts == [False, True]
    tolerance = 1e-4 if precision == "fp32" else 0.1
    for name, value in steps[0].items():
        scale = float(value.abs().max())
        torch.testing.assert_close(steps[1][name], value, rtol=0, atol=tolerance * scale + 1e-7)
        assert steps[1][name].is_contiguous()  # weights, and so files, keep their layout
