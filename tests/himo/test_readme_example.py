"""README's Python example runs as written, and ends in probabilities."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import himo
from himo.model import CONFIGS

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_ends_in_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    (example,) = re.findall(r"```python\n(import himo\n.*?)```", README.read_text(), re.DOTALL)
    (path,) = re.findall(r'himo\.load\("(.*?)"\)', example)
    monkeypatch.chdir(tmp_path)
    Path(path).parent.mkdir(parents=True)
    himo.save(himo.HiMoCLIP(CONFIGS["tiny"]), path)
    names: dict[str, Any] = {"image": Image.new("RGB", (90, 70), "red")}
    exec(example, names)
    model, preprocess = himo.load(path)
    with torch.no_grad():
        logits, _ = model(preprocess(names["image"])[None], himo.tokenize(names["texts"]))
    assert names["probabilities"].shape == (1, len(names["texts"]))
    torch.testing.assert_close(names["probabilities"], logits.softmax(dim=1))
