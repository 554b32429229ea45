"""The road of a GELU checkpoint, as most of LAION's and DataComp's are: train, reload, convert."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from clip_cases import random_image, random_model, tokens_of_lengths
from train_runs import SMALL, photos

import himo
from himo.checkpoint import convert
from himo.cli import main

COMMIT = "f" * 40
NAME = "laion/a-clip"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> Path:
    """A GELU model of 77 tokens as open_clip publishes it, in the hub's cache under NAME."""
    config = dataclasses.replace(SMALL, context_length=77, activation="gelu")
    gelu = random_model(config, generator)
    himo.save(gelu, tmp_path / "gelu.safetensors")
    folder = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots").mkdir()
    snapshot = folder / "snapshots" / COMMIT
    convert(tmp_path / "gelu.safetensors", snapshot, to="open_clip")
    written = json.loads((snapshot / "open_clip_config.json").read_text())
    assert written["model_cfg"]["quick_gelu"] is False
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_gelu_checkpoint_trains_and_comes_back(cached: Path, generator: torch.Generator) -> None:
    logs = cached / "logs"
    flags = ["--batch-size", "8", "--epochs", "1", "--warmup", "1", "--lr", "1e-4", "--workers"]
    arguments = ["train", "--train-data", str(photos(cached)), "--pretrained", NAME, *flags, "0"]
    arguments += ["--logs", str(logs), "--name", "run", "--device", "cpu", "--threads", "1"]
    assert main(arguments) == 0
    trained = logs / "run/checkpoints/epoch_1.safetensors"
    before, _ = himo.load(NAME, stretch=True)
    model, _ = himo.load(trained)
    assert model.config == before.config and model.config.activation == "gelu"
    assert model.context_length == 248
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    ]
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in changed

    image = random_image(model.config, 2, generator)
    text = tokens_of_lengths(model.config, [9, 30], generator)
    with torch.no_grad():
        expected = model(image, text)
        for layout in ("hf", "open_clip"):
            convert(trained, cached / layout, to=layout)
            copy, _ = himo.load(cached / layout)
            assert copy.config.activation == "gelu"
            assert torch.equal(copy(image, text)[0], expected[0])
        # Quick-GELU, with the same weights, is another function.
        other = himo.HiMoCLIP(dataclasses.replace(model.config, activation="quick_gelu")).eval()
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other(image, text)[0], expected[0], atol=1e-3)


def test_transformers_computes_a_gelu_model_alike(cached: Path, generator: torch.Generator) -> None:
    transformers = pytest.importorskip("transformers", reason="opens what is written")
    convert(NAME, cached / "hf", to="hf")
    model, _ = himo.load(NAME)
    theirs = transformers.CLIPModel.from_pretrained(cached / "hf").eval()
    assert theirs.config.vision_config.hidden_act == "gelu"
    image = random_image(model.config, 2, generator)
    text = tokens_of_lengths(model.config, [9, 30], generator)
    with torch.no_grad():
        got = theirs(input_ids=text.long(), pixel_values=image).logits_per_image
        torch.testing.assert_close(got, model(image, text)[0], rtol=1e-4, atol=1e-3)
