"""State dicts as training scripts keep them: under keys and prefixes, among other things."""

import argparse
import collections
import datetime
import enum
import json
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_cases import TINIEST, random_model
from torch import Tensor, nn

from himo import checkpoint
from himo.checkpoint.configurations import hf_config
from himo.checkpoint.layouts import from_himo
from himo.checkpoint.safetensors_files import write_safetensors
from himo.errors import HimoError
from himo.model import HiMoCLIP

WEIGHTS = (".safetensors", ".bin", ".pt")


@pytest.fixture
def state(generator: torch.Generator) -> dict[str, Tensor]:
    return from_himo(random_model(TINIEST, generator).state_dict(), "himo")


def read(path: Path, content: Any, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    """(state dict, what there is to say) of what torch.save writes."""
    torch.save(content, path / "x.pt", **options)
    tensors, metadata = checkpoint.read_state_dict(path / "x.pt")
    return tensors, metadata["notes"]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


KEYS: list[tuple[str, ...]] = [
    (), ("state_dict",), ("model",), ("model_state_dict",), ("module",), ("net",), ("ema",),
    ("model", "state_dict"), ("checkpoint", "models", "clip"), ("ema", "module"),
]  # fmt: skip
PREFIXES = [
    "", "module.", "_orig_mod.", "model.", "clip.", "clip_model.", "model._orig_mod.",
    "_orig_mod.module.model.", "module.module.clip._orig_mod.", "net.backbone.clip.",
    "_fsdp_wrapped_module.model._fsdp_wrapped_module.",
]  # fmt: skip


@pytest.mark.parametrize("layout", ["himo", "hf", "open_clip"])
def test_every_key_and_prefix_is_taken_away(
    layout: str, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    stored = from_himo(state, layout)
    for number, prefix in enumerate(PREFIXES):
        content: Any = {prefix + name: tensor for name, tensor in stored.items()}
        for key in reversed(KEYS[number % len(KEYS)]):
            content = {"epoch": 3, key: content, "optimizer": {"state": {0: torch.ones(2)}}}
        tensors, notes = read(tmp_path, content, _use_new_zipfile_serialization=number % 2 == 0)
        assert_same(tensors, state)
        assert notes == [], prefix
        checkpoint.load(tmp_path / "x.pt")
    # Within names, as torch.compile and FSDP put them when they wrap the towers.
    inside = {
        name.replace("resblocks.0.", "resblocks.0._checkpoint_wrapped_module._orig_mod."): tensor
        for name, tensor in from_himo(state, "himo").items()
    }
    assert_same(read(tmp_path, inside)[0], state)


def test_a_text_tower_of_its_own_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    # As open_clip's CustomTextCLIP names it.
    stored = {
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
        for name, tensor in from_himo(state, "open_clip").items()
    }
    assert_same(read(tmp_path, {"state_dict": stored})[0], state)


def test_of_several_models_one_is_read_and_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    tensors, notes = read(tmp_path, {"model_ema": other, "model": state})
    assert_same(tensors, state)
    assert notes == ["holds 2 models: read is 'model', not 'model_ema'"]
    tensors, notes = read(tmp_path, {"student": state, "teacher": other})
    assert_same(tensors, state)
    assert notes == ["holds 2 models: read is 'student', not 'teacher'"]

    def under(prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in values.items()}

    both = under("ema_model.", other) | under("model.", state) | {"loss.margin": torch.ones(1)}
    tensors, notes = read(tmp_path, {"state_dict": both})
    assert_same(tensors, state)
    (note,) = notes
    assert note.startswith(
        f"read is the model under 'model.'; {len(other) + 1} tensors are left alone: ema_model."
    )
    tensors, notes = read(tmp_path, state | under("ema.", other))
    assert_same(tensors, state)
    assert notes[0].startswith("read is the model without a prefix; ")
    twice = state | {f"module.{name}": tensor for name, tensor in other.items()}
    torch.save(twice, tmp_path / "x.pt")
    with pytest.raises(HimoError, match="twice, once in a wrapper"):
        checkpoint.load(tmp_path / "x.pt")


def test_an_averaged_model_is_read(tmp_path: Path) -> None:
    model = HiMoCLIP(TINIEST)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert "n_averaged" in averaged.state_dict()
    expected = from_himo(model.state_dict(), "himo")
    assert_same(read(tmp_path, averaged.state_dict())[0], expected)


class Colour(enum.Enum):
    RED = 1


class Settings:
    """What a configuration library keeps: attributes, and references to itself."""

    def __init__(self) -> None:
        self.content = {"lr": 1e-6, "tags": ("a", frozenset({1}))}
        self.parent = self


class Attributes(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(3).to_sparse())


BESIDE: dict[str, Any] = {
    "args": argparse.Namespace(lr=1e-6, out=pathlib.Path("/runs/1")),
    "simple": types.SimpleNamespace(a=1),
    "best": np.float64(0.31),
    "array": np.arange(3.0),
    "dtype of numpy": np.dtype("float32"),
    "path": pathlib.PurePosixPath("/runs/1"),
    "counter": collections.Counter({10: 1}),
    "default": collections.defaultdict(list, a=[1]),
    "deque": collections.deque([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "delta": datetime.timedelta(seconds=1),
    "enum": Colour.RED,
    "settings": Settings(),
    "attributes": Attributes(a=1),
    "set": {1, 2},
    "complex": 1j,
    "bytes": bytearray(b"abc"),
    "slice": slice(1, 2),
    "range": range(3),
    "type": Settings,
    "function": torch.nn.functional.relu,
    "keys": {(1, 2): 3, None: 4, 0.5: 5, True: 6, torch.float32: 7},
    "size": torch.Size([1, 2]),
    "generator": torch.get_rng_state(),
    "sparse": torch.eye(2).to_sparse(),
    "module": nn.Linear(2, 2),
    "buffers": Sparse(),
    "half": torch.zeros(2, dtype=torch.complex64),
    "small": torch.zeros(2, dtype=torch.float8_e4m3fn),
    "meta": torch.zeros(2, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (True, 4), (False, 2)])
def test_what_stands_beside_the_weights_is_left_alone(
    zipped: bool, protocol: int, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    for name, value in BESIDE.items():
        if name == "small" and not zipped:
            continue  # torch does not write it
        tensors, notes = read(tmp_path, {name: value, "state_dict": state}, **options)
        assert_same(tensors, state)
        assert notes == [], name
    tensors, _ = read(tmp_path, {"state_dict": state, **BESIDE}, pickle_protocol=protocol)
    assert_same(tensors, state)
    # And among the tensors, of which none is missing.
    tensors, _ = read(tmp_path, {**state, "epoch": 3, "best": np.float64(0.3)}, **options)
    assert_same(tensors, state)


@pytest.mark.parametrize("holder", [Attributes, collections.OrderedDict, collections.UserDict])
def test_a_state_dict_may_be_of_any_kind_of_dict(
    holder: Any, tmp_path: Path, state: dict[str, Tensor]
) -> None:
    content = holder(state)
    assert_same(read(tmp_path, {"model": content})[0], state)


def test_parameters_and_tensors_with_attributes_are_tensors(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    content: dict[str, Tensor] = {}
    for name, tensor in state.items():
        content[name] = nn.Parameter(tensor.clone())
        if name.startswith("visual"):
            content[name].shard = (1, 2)  # type: ignore[attr-defined]
    assert_same(read(tmp_path, content)[0], state)
    for tensor in (plain := {name: tensor.clone() for name, tensor in state.items()}).values():
        tensor.shard = 1  # type: ignore[attr-defined]
    assert_same(read(tmp_path, plain)[0], state)


def test_a_pickled_module_is_read_for_its_tensors(
    tmp_path: Path, generator: torch.Generator
) -> None:
    model = random_model(TINIEST, generator)
    assert_same(read(tmp_path, {"model": model})[0], from_himo(model.state_dict(), "himo"))


def test_what_is_no_state_dict_is_told_how_to_become_one(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    contents: list[tuple[Any, str]] = [
        (Settings(), r"a \S*Settings without tensors by name"),
        ({**state, "losses": list(range(260_000))}, "more instructions than any checkpoint has"),
        ([state], "a list without tensors by name"),
        ({"model": None}, "a dict without tensors by name"),
        (
            {**state, "visual.proj": torch.eye(8).to_sparse()},
            "'visual.proj' is a torch._utils",
        ),
        ({**state, "visual.proj": torch.zeros(8, 8, device="meta")}, "_rebuild_meta_tensor"),
    ]
    for content, message in contents:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(HimoError, match=message) as error:
            checkpoint.load(tmp_path / "x.pt")
        assert str(error.value).endswith("writes a file that is read")


@pytest.mark.parametrize("suffix", WEIGHTS)
def test_shards_of_any_suffix_are_joined(
    suffix: str, tmp_path: Path, state: dict[str, Tensor], generator: torch.Generator
) -> None:
    stored = from_himo(state, "hf")
    files = {name: f"part-{i % 3}{suffix}" for i, name in enumerate(sorted(stored))}
    for file in {*files.values()}:
        part = {name: stored[name] for name in files if files[name] == file}
        if suffix == ".safetensors":
            write_safetensors(str(tmp_path / file), part, {})
        else:
            torch.save(part, tmp_path / file)
    main = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (tmp_path / "config.json").write_text(json.dumps(hf_config(TINIEST)))
    (tmp_path / f"{main}.index.json").write_text(json.dumps({"weight_map": files}))
    assert_same(checkpoint.read_state_dict(tmp_path)[0], state)


def test_a_part_of_several_files_names_the_others(tmp_path: Path, state: dict[str, Tensor]) -> None:
    part = tmp_path / "pytorch_model-00001-of-00002.bin"
    torch.save(state, part)
    index = f"{tmp_path}/pytorch_model.bin.index.json"
    with pytest.raises(HimoError, match=rf"there is '{part.name}' without its index, pytorch_mod"):
        checkpoint.load(tmp_path)
    for name in (part, index):
        with pytest.raises(
            HimoError, match=rf"several files: expected their directory, {tmp_path}"
        ):
            checkpoint.load(name)
    torch.save(state, tmp_path / "x-00001-of-00001.bin")  # the only part is the whole
    assert_same(checkpoint.read_state_dict(tmp_path / "x-00001-of-00001.bin")[0], state)


def test_a_directory_names_the_weights_that_it_has(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save(state, tmp_path / "epoch_3.pt")
    with pytest.raises(HimoError, match=r"there is 'epoch_3\.pt': name the file"):
        checkpoint.load(tmp_path)
    (tmp_path / "epoch_3.pt").rename(tmp_path / "epoch_3.ckpt")
    with pytest.raises(HimoError, match=r"there is 'epoch_3\.ckpt': name the file"):
        checkpoint.load(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "epoch_3.ckpt").rename(tmp_path / "runs/last.ckpt")
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(HimoError, match=r"there is 'runs/last\.ckpt': name the file"):
        checkpoint.load(tmp_path)
    (tmp_path / "runs/last.ckpt").unlink()
    with pytest.raises(HimoError, match=r"there is 'tf_model\.h5': not read"):
        checkpoint.load(tmp_path)
    torch.save(from_himo(state, "open_clip"), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(HimoError, match=r"a directory without open_clip_config\.json, which its"):
        checkpoint.load(tmp_path)
