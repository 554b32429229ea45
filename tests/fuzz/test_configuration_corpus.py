"""Configurations of checkpoints, each field at values of every kind: used, or refused in a line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_cases import TINIEST
from fuzz_corpus import bounded, corpus
from safetensors.torch import save_file

from himo import checkpoint
from himo.checkpoint.configurations import hf_config, hf_preprocessor_config, open_clip_config
from himo.checkpoint.layouts import from_himo
from himo.errors import HimoError
from himo.model import HiMoCLIP

FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "config.json": ("hf", hf_config(TINIEST)),
    "preprocessor_config.json": ("hf", hf_preprocessor_config(TINIEST)),
    "open_clip_config.json": ("open_clip", open_clip_config(TINIEST)),
}
VALUES: dict[str, Any] = {
    "minus one": -1,
    "zero": 0,
    "2^70": 1 << 70,
    "a half": 0.5,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "true": True,
    "null": None,
    "a long text": "x" * 100_000,
    "a text of ESC": "\x1b[31m\x07\u202e",
    "an empty list": [],
    "a list in lists": [[[[]]]],
    "a list of two": [8, 9],
    "a list of three texts": ["a", "b", "c"],
    "a list of three zeros": [0, 0, 0],
    "a long list": [1] * 10_000,
    "an empty object": {},
    "an object in objects": {"image_processor": {"image_processor": {"size": {}}}},
    "an object of sides": {"height": 8, "width": [], "x" * 10_000: 8},
}
INPUTS = {f"{name} in {file}": (file, value) for file in FILES for name, value in VALUES.items()}


def places(content: Any, keys: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys that lead to every value of an object."""
    found = [keys] if keys else []
    for key, value in content.items() if isinstance(content, dict) else ():
        found += places(value, (*keys, key))
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    state = HiMoCLIP(TINIEST).state_dict()
    weights = {"hf": "model.safetensors", "open_clip": "open_clip_model.safetensors"}
    for layout, name in weights.items():
        (root / layout).mkdir()
        save_file(from_himo(state, layout), root / layout / name)
    for file, (layout, content) in FILES.items():
        (root / layout / file).write_text(json.dumps(content))
        checkpoint.load(root / layout)
    return {layout: root / layout for layout in weights}


def test_the_corpus_is_large() -> None:
    assert len(INPUTS) >= 30


@pytest.mark.parametrize("item", corpus(INPUTS))
def test_a_field_of_any_value_is_used_or_refused(
    item: tuple[str, Any], directories: dict[str, Path]
) -> None:
    file, value = item
    layout, plain = FILES[file]
    path = directories[layout]
    refused = 0
    try:
        for keys in places(plain):
            content = copy.deepcopy(plain)
            part = content
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value
            (path / file).write_text(json.dumps(content))
            with bounded(2.0, 64.0):
                try:
                    model, _ = checkpoint.load(path)
                except HimoError as error:
                    message = str(error).replace(str(path), "")
                    assert message.isprintable() and len(message) < 500
                    refused += 1
                else:  # with the value that is there already, or where no feature depends on it
                    with torch.no_grad():
                        model.encode_image(torch.zeros(1, 3, 8, 8))
    finally:
        (path / file).write_text(json.dumps(plain))
    assert refused > 2 or value in (None, True, 0)
