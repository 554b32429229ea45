"""Checkpoints of every project: read to the same model, written to the same bits, or refused."""

import argparse
import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_cases import SMALL, TINIEST, random_image, random_model, tokens_of_lengths
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from himo import checkpoint
from himo.checkpoint.configurations import hf_config
from himo.checkpoint.layouts import from_himo, stretch_positions
from himo.checkpoint.safetensors_files import write_safetensors
from himo.errors import HimoError
from himo.model import CONFIGS, KEPT_POSITIONS, CLIPConfig, HiMoCLIP

CLIP_77 = CLIPConfig.from_dict({**SMALL.to_dict(), "context_length": 77})
LAYOUTS = ["himo", "open_clip", "hf"]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, dtypes included."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def canonical(model: HiMoCLIP) -> dict[str, Tensor]:
    """The state dict as checkpoints hold it: rows that are never read equal to those that are."""
    return from_himo(model.state_dict(), "himo")


class Holder(nn.Module):
    """A module tree that holds the tensors of a state dict, for TorchScript to save."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        children: dict[str, dict[str, Tensor]] = collections.defaultdict(dict)
        for name, tensor in state.items():
            first, _, rest = name.partition(".")
            if rest:
                children[first][rest] = tensor
            else:
                self.register_buffer(first, tensor)
        for name, part in children.items():
            self.add_module(name, Holder(part))

    def forward(self, x: Tensor) -> Tensor:
        return x


def write(path: Path, model: HiMoCLIP, kind: str) -> dict[str, Tensor]:
    """Writes a model as `kind` of project does; returns the values, as himo should read them."""
    state = canonical(model)
    if kind == "himo":  # dead rows hold whatever was in memory
        stored = {name: tensor.clone() for name, tensor in state.items()}
        stored["positional_embedding"][KEPT_POSITIONS:] = torch.nan
        stored["positional_embedding_res"][:KEPT_POSITIONS] = 1.5e27
        torch.save(collections.OrderedDict(stored), path)
    elif kind == "himo legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind.startswith("openai"):  # float16 but for norms and embeddings, three numbers more
        state = canonical(model.set_precision(torch.float16))
        stored = from_himo(state, "open_clip")
        for number in ("input_resolution", "context_length", "vocab_size"):
            stored[number] = torch.tensor(1)
        if kind == "openai state dict":
            torch.save(stored, path)
        else:
            torch.jit.save(torch.jit.script(Holder(stored)), path)
    elif kind == "open_clip epoch":
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = canonical(model)
        named = {f"module.{n}": t for n, t in from_himo(state, "open_clip").items()}
        epoch = {"epoch": 3, "name": "run", "state_dict": named}
        torch.save({**epoch, "optimizer": optimizer.state_dict(), "scaler": {"scale": 1.5}}, path)
    elif kind == "compiled":
        torch.save({f"_orig_mod.module.{n}": t for n, t in state.items()}, path)
    else:
        raise KeyError(kind)
    return state


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "layout", "container", "checksum"),
    [
        ("himo", "himo", "torch", "crc32"),
        ("himo legacy", "himo", "torch legacy", "none"),
        ("openai state dict", "open_clip", "torch", "crc32"),
        ("openai TorchScript", "open_clip", "torchscript", "crc32"),
        ("open_clip epoch", "open_clip", "torch", "crc32"),
        ("compiled", "himo", "torch", "crc32"),
    ],
)
def test_files_of_other_projects_are_read(
    kind: str,
    layout: str,
    container: str,
    checksum: str,
    tmp_path: Path,
    generator: torch.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = CLIP_77 if kind.startswith("openai") else SMALL
    path = tmp_path / "model.pt"
    expected = write(path, random_model(config, generator), kind)
    state, metadata = checkpoint.read_state_dict(path)
    assert_same(state, expected)
    assert (metadata["layout"], metadata["container"]) == (layout, container)
    assert metadata["checksum"] == checksum
    model, preprocess = checkpoint.load(path)
    assert (model.config, preprocess.resolution) == (config, 32)  # 77 positions stay 77
    assert not model.training
    assert model.provenance == {
        "source": "model.pt",
        "source_layout": layout,
        "source_container": container,
    }
    if config is SMALL:
        assert_same(model.state_dict(), expected)
    noted = "carries no checksum" in capsys.readouterr().err
    assert noted == (checksum == "none")


def test_77_positions_are_stretched_to_248(tmp_path: Path, generator: torch.Generator) -> None:
    clip = random_model(CLIP_77, generator)
    table = clip.positional_embedding.data.clone()  # [77, W]
    clip.positional_embedding_res.data = table
    # Long-CLIP's rule, row by row.
    rows = [table[i] for i in range(20)]
    for i in range(20, 76):
        rows += [((4 - j) * table[i] + j * table[i + 1]) / 4 for j in range(4)]
    rows += [table[76] + j * (table[76] - table[75]) / 4 for j in range(4)]
    expected = torch.stack(rows)
    assert expected.shape == (248, SMALL.text_width)
    torch.save(from_himo(clip.state_dict(), "open_clip"), tmp_path / "clip.pt")
    model, _ = checkpoint.load(tmp_path / "clip.pt", stretch=True)
    torch.testing.assert_close(model.positional_embedding.data, expected)
    assert torch.equal(model.positional_embedding, model.positional_embedding_res)
    assert torch.equal(model.positional_embedding[:20], table[:20])
    # A text within the kept rows has the features of the CLIP it comes from.
    tokens = tokens_of_lengths(SMALL, [20, 7], generator, width=77)
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), clip.encode_text(tokens))


def test_77_positions_stay_unless_they_are_stretched(
    tmp_path: Path, generator: torch.Generator
) -> None:
    clip = random_model(CLIP_77, generator)
    torch.save(from_himo(clip.state_dict(), "open_clip"), tmp_path / "clip.pt")
    kept, _ = checkpoint.load(tmp_path / "clip.pt")
    assert kept.config == CLIP_77
    tokens = tokens_of_lengths(CLIP_77, [20, 77], generator)
    with torch.no_grad():
        assert torch.equal(kept.encode_text(tokens), clip.encode_text(tokens))
    checkpoint.save(kept, tmp_path / "kept.safetensors")
    for name, to in (("hf", "hf"), ("himo.safetensors", "himo"), ("oc.pt", "open_clip")):
        checkpoint.convert(tmp_path / "clip.pt", tmp_path / name, to)
    for name in ("kept.safetensors", "hf", "himo.safetensors", "oc.pt"):
        assert checkpoint.load(tmp_path / name)[0].config == CLIP_77, name
        assert checkpoint.load(tmp_path / name, stretch=True)[0].config == SMALL, name
    checkpoint.convert(tmp_path / "clip.pt", tmp_path / "long.safetensors", stretch=True)
    assert checkpoint.load(tmp_path / "long.safetensors")[0].config == SMALL
    assert stretch_positions({"positional_embedding": torch.zeros(76, 4)}).keys() == {
        "positional_embedding"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load_keep_every_bit(
    dtype: torch.dtype, tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(SMALL, generator).set_precision(dtype)
    model.provenance = {"source": "earlier"}
    path = tmp_path / "model.safetensors"
    digest = checkpoint.save(model, path, metadata={"tau": 0.9, "data": ["a", "é"]})
    loaded, _ = checkpoint.load(path, dtype=dtype)
    assert_same(loaded.state_dict(), canonical(model))
    assert loaded.config == model.config
    assert loaded.provenance == {"source": "earlier", "tau": 0.9, "data": ["a", "é"]}
    _, metadata = checkpoint.read_state_dict(path)
    assert (metadata["layout"], metadata["checksum"]) == ("himo", "sha256")
    assert checkpoint.save(loaded, tmp_path / "again.safetensors") == digest
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_heads_that_no_shape_tells_are_kept(tmp_path: Path, generator: torch.Generator) -> None:
    config = CLIPConfig.from_dict({**SMALL.to_dict(), "vision_heads": 8, "text_heads": 4})
    model = random_model(config, generator)
    checkpoint.save(model, tmp_path / "a.safetensors")
    for layout in LAYOUTS:
        checkpoint.convert(tmp_path / "a.safetensors", tmp_path / f"{layout}.safetensors", layout)
        assert checkpoint.load(tmp_path / f"{layout}.safetensors")[0].config == config


def test_a_trained_model_can_be_saved_and_trained_on(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(TINIEST, generator)
    checkpoint.save(model, tmp_path / "a.safetensors")
    model, _ = checkpoint.load(tmp_path / "a.safetensors")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"positional_embedding"}
    image = random_image(TINIEST, 2, generator)
    text = tokens_of_lengths(TINIEST, [5, 24], generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(image, text)[0], torch.arange(2)).backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before) - {"positional_embedding"}
    checkpoint.save(model, tmp_path / "b.safetensors")
    again, _ = checkpoint.load(tmp_path / "b.safetensors")
    with torch.no_grad():
        assert torch.equal(again.encode_text(text), model.encode_text(text))
        assert torch.equal(again.encode_image(image), model.encode_image(image))


@pytest.mark.parametrize("to", ["open_clip", "hf"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_conversion_there_and_back_keeps_every_bit(
    to: str, suffix: str, dtype: torch.dtype, tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(SMALL, generator).set_precision(dtype)
    first, there, back = (
        tmp_path / name for name in ("a.safetensors", f"there{suffix}", "b.safetensors")
    )
    checkpoint.save(model, first, metadata={"tau": 0.9})
    checkpoint.convert(first, there, to)
    checkpoint.convert(there, back, "himo")
    assert_same(checkpoint.read_state_dict(back)[0], canonical(model))
    if suffix != ".pt":  # it has no place for metadata
        assert first.read_bytes() == back.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.name, there.name, back.name])


@pytest.mark.parametrize("context", [77, 248])
def test_every_layout_converts_to_every_other(
    context: int, tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(
        CLIPConfig.from_dict({**SMALL.to_dict(), "context_length": context}), generator
    )
    expected = from_himo(model.state_dict(), "hf")
    path = tmp_path / "0.pt"
    torch.save(from_himo(model.state_dict(), "open_clip"), path)
    for step, layout in enumerate(["hf", "open_clip", "hf", "open_clip", "hf"], start=1):
        following = tmp_path / f"{step}.pt"
        checkpoint.convert(path, following, layout)
        path = following
    assert_same(torch.load(path, weights_only=True), expected)


def test_a_himo_checkpoint_of_convert_is_what_upstream_reads(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(SMALL, generator)
    checkpoint.save(model, tmp_path / "a.safetensors")
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "a.pt", "himo")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert_same(state, canonical(model))
    assert state["positional_embedding"].shape == state["positional_embedding_res"].shape
    checkpoint.convert(tmp_path / "a.pt", tmp_path / "b.pt", "open_clip")
    assert "positional_embedding_res" not in torch.load(tmp_path / "b.pt", weights_only=True)


def features(model: HiMoCLIP, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(text)


def hf_features(model: Any, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        vision = model.vision_model(pixel_values=image).pooler_output
        words = model.text_model(input_ids=text).pooler_output
        return model.visual_projection(vision), model.text_projection(words)


@pytest.mark.parametrize(("context", "activation"), [(77, "quick_gelu"), (248, "gelu")])
def test_transformers_and_himo_give_the_same_features(
    context: int, activation: str, tmp_path: Path, generator: torch.Generator
) -> None:
    transformers = pytest.importorskip("transformers", reason="parity needs transformers")
    changed = {"context_length": context, "activation": activation}
    config = CLIPConfig.from_dict({**SMALL.to_dict(), **changed})
    image = random_image(config, 3, generator)
    text = tokens_of_lengths(config, [5, 20, context], generator)

    # From himo: what `himo convert --to hf` writes.
    model = random_model(config, generator)
    checkpoint.save(model, tmp_path / "himo.safetensors")
    checkpoint.convert(tmp_path / "himo.safetensors", tmp_path / "hf", "hf")
    theirs, report = transformers.CLIPModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    for ours, other in zip(
        features(model, image, text), hf_features(theirs.eval(), image, text), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
        assert ours.abs().max() > 0.1  # a bound of 1e-5 says something

    # From transformers: random weights as it draws and saves them, whole and in shards.
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**hf_config(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for name, size in (("whole", "1GB"), ("shards", "200KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=size)
        model, _ = checkpoint.load(tmp_path / name, stretch=False)
        assert model.config == config
        for ours, other in zip(
            features(model, image, text), hf_features(theirs, image, text), strict=True
        ):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1


def test_safetensors_files_are_those_of_the_library(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(SMALL, generator).set_precision(torch.bfloat16)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    checkpoint.save(model, ours)
    assert_same(load_file(ours), canonical(model))
    save_file(canonical(model), theirs, metadata={"format": "pt"})
    state, metadata = checkpoint.read_state_dict(theirs)
    assert_same(state, canonical(model))
    assert metadata["checksum"] == "none"


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    values = torch.arange(12.0)
    parts = {"all": values, "again": values, "part": values[2:6], "columns": values.view(3, 4).t()}
    write_safetensors(str(tmp_path / "a.safetensors"), parts, {"note": "x"})
    assert_same(load_file(tmp_path / "a.safetensors"), parts)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_nothing_is_written_that_would_not_be_read(tmp_path: Path) -> None:
    path, model = tmp_path / "a.safetensors", HiMoCLIP(TINIEST)
    with pytest.raises(HimoError, match="at most 1,048,576 bytes of metadata"):
        checkpoint.save(model, path, metadata={"note": "x" * (1 << 20)})
    with pytest.raises(HimoError, match="20,001 tensors, expected at most 20,000"):
        write_safetensors(str(path), {str(i): torch.zeros(0) for i in range(20_001)}, {})
    with pytest.raises(HimoError, match="expected at most 4,194,304"):
        write_safetensors(str(path), {"a": torch.zeros(1)}, {"note": "x" * (5 << 20)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_mode_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    path, before = tmp_path / "a.safetensors", os.umask(mask)
    try:
        checkpoint.save(HiMoCLIP(TINIEST), path)
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
        path.chmod(0o640)
        checkpoint.save(HiMoCLIP(TINIEST), path)
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_header_of_any_length_is_one_of_safetensors(tmp_path: Path) -> None:
    # The first byte of a file is its header's length modulo 256: 128 is a pickle's first byte too.
    seen = set()
    for length in range(0, 300, 8):
        path = tmp_path / f"{length}.safetensors"
        checkpoint.save(HiMoCLIP(TINIEST), path, metadata={"note": length * "x"})
        seen.add(path.read_bytes()[0])
        assert checkpoint.read_state_dict(path)[1]["provenance"] == {"note": length * "x"}
    assert 0x80 in seen


@pytest.mark.parametrize("strict", [True, False])
def test_what_does_not_fit_is_listed(
    strict: bool,
    tmp_path: Path,
    generator: torch.Generator,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = canonical(random_model(SMALL, generator))
    block = "visual.transformer.resblocks.1."
    del state["ln_final.weight"], state[block + "attn.in_proj_bias"]
    state["logit_bias"] = torch.zeros(3)
    state["visual.proj"] = torch.zeros(64, 47)
    state["ln_final.bias"] = torch.zeros(128, dtype=torch.int64)
    lists = [
        ["ln_final.weight [128]", block + "attn.in_proj_bias [192]"],
        ["logit_bias [3]"],
        ["visual.proj [64, 47], expected [64, 48]", "ln_final.bias of torch.int64"],
    ]
    path = tmp_path / "model.pt"
    torch.save(state, path)
    if strict:
        with pytest.raises(HimoError) as error:
            checkpoint.load(path)
        text = str(error.value)
        assert text.startswith(f"{path}: its tensors are not those of a model: 2 missing: ")
        assert "1 unexpected: " in text
        assert "2 misshapen: " in text
        assert "\n" not in text
    else:
        model, _ = checkpoint.load(path, strict=False)
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 5 + 1  # and what the file does not state
        assert text.count("left at its initial value") == 4
        assert torch.equal(model.ln_final.weight, torch.ones(128))
        assert not model.ln_final.bias.any()
        assert model.visual.proj.shape == (64, 48)
        unharmed = set(model.state_dict()) - {name.split()[0] for part in lists for name in part}
        assert len(unharmed) == len(model.state_dict()) - 4
        for name in unharmed:
            assert torch.equal(model.state_dict()[name], state[name]), name
    for names in lists:
        for name in names:
            assert name in text


@pytest.mark.parametrize("name", sorted(HiMoCLIP(TINIEST).state_dict()))
@pytest.mark.parametrize("fault", ["missing", "misshapen", "of integers"])
def test_every_tensor_is_required_in_its_shape_and_dtype(
    name: str, fault: str, tmp_path: Path, generator: torch.Generator
) -> None:
    state = canonical(random_model(TINIEST, generator))
    layout = {key: value for key, value in state.items() if key != name}
    if fault == "misshapen":
        layout[name] = torch.zeros(3, 5, 7)
    elif fault == "of integers":
        layout[name] = state[name].long()
    torch.save(layout, tmp_path / "model.pt")
    if (name, fault) == ("positional_embedding_res", "missing"):  # then it is open_clip's layout
        model, _ = checkpoint.load(tmp_path / "model.pt")
        assert torch.equal(model.positional_embedding_res, state["positional_embedding"])
        return
    with pytest.raises(HimoError) as error:
        checkpoint.load(tmp_path / "model.pt")
    assert name in str(error.value)
    assert str(tmp_path / "model.pt") in str(error.value)


def test_a_long_list_is_cut(tmp_path: Path, generator: torch.Generator) -> None:
    state = canonical(random_model(TINIEST, generator))
    state.update({f"extra.{i:02}": torch.zeros(1) for i in range(30)})
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(
        HimoError, match=r"30 unexpected: extra\.00 .*, extra\.07 \[1\] and 22 more"
    ):
        checkpoint.load(tmp_path / "model.pt")


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_tell_the_named_configurations(name: str) -> None:
    with torch.device("meta"):
        state = HiMoCLIP(CONFIGS[name]).state_dict()
    metadata = {"config": {}, "layout": "himo"}
    assert checkpoint.loading.config_of(state, metadata, "file") == CONFIGS[name]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", "the device 'cuda:99' cannot be used: "),
        ("gpu", "the device 'gpu' cannot be used: "),
    ],
)
def test_an_unusable_device_is_named(device: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(HimoError) as error:
        checkpoint.load(tmp_path / "missing", device)
    assert message in str(error.value)


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = HiMoCLIP(TINIEST)
    for arguments, message in [
        ((nn.Linear(2, 2), tmp_path / "a.safetensors"), "to be a HiMoCLIP, got a Linear"),
        ((model, tmp_path / "a.pt"), "ending in .safetensors; `himo convert` writes other"),
        ((model, tmp_path / "no" / "a.safetensors"), "cannot be written: no such file"),
    ]:
        with pytest.raises(HimoError) as error:
            checkpoint.save(*arguments)
        assert message in str(error.value)
    for value in (float("nan"), object()):
        with pytest.raises(HimoError, match="metadata that JSON can hold"):
            checkpoint.save(model, tmp_path / "a.safetensors", metadata={"tau": value})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    checkpoint.save(HiMoCLIP(TINIEST), source)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    for destination, to, message in [
        (
            tmp_path / "b.pt",
            "onnx",
            "convert: expected `to` to be one of himo, open_clip, hf, got 'onnx'",
        ),
        (tmp_path / "b", "himo", "ending in .safetensors or .pt, .pth, .bin"),
        (full, "hf", "exists, expected a new or an empty directory"),
        (source / "b", "hf", "cannot be written: Not a directory"),
        (tmp_path / "no" / "b", "hf", "cannot be written: No such file or directory"),
        (tmp_path / "no" / "b.pt", "hf", "cannot be written: no such file or directory"),
    ]:
        with pytest.raises(HimoError) as error:
            checkpoint.convert(source, destination, to)
        assert message in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "full"]
    assert [p.name for p in full.iterdir()] == ["mine"]


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "hf"
    checkpoint.save(HiMoCLIP(TINIEST), source)
    parser = argparse.ArgumentParser()
    checkpoint.add_arguments(parser)
    assert checkpoint.run(parser.parse_args([str(source), str(target), "--to", "hf"])) == 0
    assert capsys.readouterr().out == f"wrote {target} (hf)\n"
    config = json.loads((target / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == TINIEST.context_length
    assert config["text_config"]["hidden_act"] == "quick_gelu"
    assert parser.parse_args(["a", "b"]).to == "himo"


def test_open_clips_configuration_names_what_it_needs(tmp_path: Path) -> None:
    checkpoint.save(HiMoCLIP(SMALL), tmp_path / "a.safetensors")
    (tmp_path / "open_clip").mkdir()  # empty: as good as new
    checkpoint.convert(tmp_path / "a.safetensors", tmp_path / "open_clip", "open_clip")
    content = json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())
    model = content["model_cfg"]
    assert model["quick_gelu"] is True
    assert model["text_cfg"] == {
        "context_length": 248, "vocab_size": 500, "width": 128, "heads": 2, "layers": 3,
    }  # fmt: skip
    assert model["vision_cfg"] == {
        "image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8,
    }  # fmt: skip
    assert len(content["preprocess_cfg"]["mean"]) == 3
    # Written by open_clip, the weights say nothing of the heads, and no shape does.
    state = from_himo(HiMoCLIP(SMALL).state_dict(), "open_clip")
    write_safetensors(str(tmp_path / "open_clip" / "open_clip_model.safetensors"), state, {})
    model["vision_cfg"]["head_width"], model["text_cfg"]["heads"] = 16, 8
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(json.dumps(content))
    loaded, _ = checkpoint.load(tmp_path / "open_clip")
    assert (loaded.config.vision_heads, loaded.config.text_heads) == (4, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_cuda_is_loaded_and_saved(tmp_path: Path, generator: torch.Generator) -> None:
    model = random_model(SMALL, generator).cuda()
    checkpoint.save(model, tmp_path / "a.safetensors")
    loaded, _ = checkpoint.load(tmp_path / "a.safetensors", "cuda", torch.bfloat16)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    assert loaded.dtype == torch.bfloat16
    assert_same(checkpoint.read_state_dict(tmp_path / "a.safetensors")[0], canonical(model.cpu()))
