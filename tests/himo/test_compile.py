"""`--compile`: the towers and the loss are one graph for captions of all lengths."""

import dataclasses

import pytest
import torch
from train_runs import SMALL, lines, photos, small_model, train

import himo
from himo.config import TrainConfig
from himo.model import HiMoCLIP
from himo.objective import Objective
from himo_kernels.testing import relative_error

SETTINGS = TrainConfig(train_data="x", batch_size=8, accum_freq=1)
COUNTERS = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    COUNTERS.clear()
    yield
    torch._dynamo.reset()


def batches(generator):
    for words in (3, 9, 20):
        images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
        texts = [f"a card with number {number} " + "and more " * words for number in range(8)]
        yield images, himo.tokenize(texts), words * 2 + 10


def objectives(**changes):
    """An objective, and a compiled one of the same weights that refuses a break in its graph."""
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        settings = dataclasses.replace(SETTINGS, compile=compiles, **changes)
        found.append(Objective(HiMoCLIP(SMALL), settings))
    region = found[1] if settings.accum_freq == 1 else found[1].towers
    assert region._compiled_call_impl is not None
    region.compile(fullgraph=True, backend="aot_eager")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, size, graphs",
    [
        ({}, 8, 1),
        ({"loss": "clip", "grad_checkpointing": True}, 8, 1),
        ({"decompose_images": True, "precision": "amp_bf16"}, 8, 1),
        ({"accum_freq": 2}, 4, 2),  # the towers, without and with a gradient
    ],
    ids=["himo", "clip", "images", "parts"],
)
def test_a_step_is_one_graph_for_captions_of_all_lengths(changes, size, graphs, generator):
    plain, compiled = objectives(**changes)
    if changes.get("grad_checkpointing"):
        plain.model.set_grad_checkpointing()
        compiled.model.set_grad_checkpointing()
    limit = 1e-2 if "precision" in changes else 1e-5  # of bfloat16, with 8 bits
    for images, tokens, length in batches(generator):
        outputs = [one.backward(images, tokens, length, size) for one in (plain, compiled)]
        assert outputs[1].keys() == outputs[0].keys()
        losses = [output["loss"].item() for output in outputs]
        assert losses[1] == pytest.approx(losses[0], rel=limit)
        gradients = [
            torch.cat([p.grad.flatten() for p in one.parameters() if p.requires_grad])
            for one in (plain, compiled)
        ]
        assert relative_error(gradients[1], gradients[0]) < limit
    assert COUNTERS["stats"]["unique_graphs"] == graphs and not COUNTERS["graph_break"]


@pytest.mark.slow  # inductor compiles for a minute
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path):
    pairs, small = photos(tmp_path), small_model(tmp_path)
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        train(pairs, tmp_path / name, *small, "--held-out", "8", *flags)
    plain, compiled = (lines(tmp_path / name) for name in ("plain", "compiled"))
    assert len(plain) == 4
    for before, after in zip(plain, compiled, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
