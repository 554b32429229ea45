"""The towers as graphs: torch.export and ONNX for every batch and length, equal to eager."""

import importlib.util
from pathlib import Path

import pytest
import torch
from clip_cases import SMALL, TINIEST, random_image, random_model, tokens_of_lengths
from torch import Tensor, nn
from torch.export import Dim

from himo.model import CLIPConfig, HiMoCLIP

ROUNDING = {"rtol": 1e-4, "atol": 2e-5}  # as in test_model.py
# A single token, both sides of the 20 positions that are kept, and the whole context.
LENGTHS = ([1], [2, 2], [19, 20], [21, 3, 8], [248, 4], [60] * 5)


class TextTower(nn.Module):
    def __init__(self, model: HiMoCLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)


def shapes_of_text(config: CLIPConfig) -> dict[int, object]:
    return {0: Dim("texts"), 1: Dim("length", max=config.context_length)}


def check(graph, model: HiMoCLIP, generator: torch.Generator) -> None:
    for lengths in LENGTHS:
        lengths = [min(length, model.context_length) for length in lengths]
        padded = tokens_of_lengths(model.config, lengths, generator)
        for text in (padded, padded[:, : max(lengths)].contiguous()):
            with torch.no_grad():
                expected = model.encode_text(text)
            torch.testing.assert_close(graph(text), expected, **ROUNDING)


@pytest.mark.parametrize(
    "config",
    [pytest.param(SMALL, id="context 248", marks=pytest.mark.slow), pytest.param(TINIEST, id="24")],
)
def test_the_text_tower_exports_with_any_batch_and_length(config, generator) -> None:
    model = random_model(config, generator)
    example = tokens_of_lengths(config, [5, 9, 7], generator, width=9)
    tower = torch.export.export(
        TextTower(model), (example,), dynamic_shapes=(shapes_of_text(config),)
    )
    check(tower.module(), model, generator)


@pytest.mark.slow
def test_both_towers_export(generator) -> None:
    model = random_model(TINIEST, generator)
    inputs = random_image(TINIEST, 2, generator), tokens_of_lengths(TINIEST, [5, 9, 7], generator)
    shapes = ({0: Dim("images")}, {0: Dim("texts")})
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    image, text = (
        random_image(TINIEST, 5, generator),
        tokens_of_lengths(TINIEST, [3, 21], generator),
    )
    with torch.no_grad():
        torch.testing.assert_close(exported(image, text), model(image, text), **ROUNDING)


@pytest.mark.slow
def test_a_compiled_text_tower_reads_no_token(generator) -> None:
    model = random_model(TINIEST, generator)
    encode = torch.compile(model.encode_text, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 9], [3, 20]):
        text = tokens_of_lengths(TINIEST, lengths, generator)
        with torch.no_grad():
            torch.testing.assert_close(encode(text), model.encode_text(text), **ROUNDING)
            short = encode(text, max_length=20)
            torch.testing.assert_close(short, model.encode_text(text), **ROUNDING)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="expected text of shape"):
        encode(torch.zeros(2, 25, dtype=torch.int64))


@pytest.mark.slow  # 10 s
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "torchscript"])
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
def test_the_text_tower_as_onnx(dynamo, generator, tmp_path: Path) -> None:
    import onnxruntime

    model = random_model(SMALL, generator)
    example = tokens_of_lengths(SMALL, [5, 9, 7], generator, width=9)
    path = tmp_path / "text.onnx"
    if dynamo:
        options = {"dynamic_shapes": (shapes_of_text(SMALL),)}
    else:
        options = {"dynamic_axes": {"text": {0: "texts", 1: "length"}}, "input_names": ["text"]}
    torch.onnx.export(TextTower(model).eval(), (example,), path, dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(path)

    def run(text: Tensor) -> Tensor:
        (features,) = session.run(None, {"text": text.numpy()})
        return torch.from_numpy(features)

    check(run, model, generator)
