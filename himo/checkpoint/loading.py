"""Loads and saves models: any known file to a `HiMoCLIP`, and a `HiMoCLIP` to safetensors."""

import json
import os
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from himo.checkpoint.layouts import (
    State,
    deduce_config,
    from_himo,
    heads_of_hf,
    heads_of_open_clip,
    stretch_positions,
    to_himo,
)
from himo.checkpoint.safetensors_files import (
    DIGEST,
    read_safetensors,
    strict_json,
    write_safetensors,
)
from himo.checkpoint.torch_files import read_legacy, read_zip
from himo.device import usable_device
from himo.errors import HimoError
from himo.files import open_regular
from himo.model import CONFIGS, CLIPConfig, HiMoCLIP
from himo_kernels import __version__

if TYPE_CHECKING:
    from himo.transforms import Preprocess

# Metadata of the safetensors files that himo writes; the digest is added to them.
CONFIG, LAYOUT, PROVENANCE, VERSION = (
    f"himo_{name}" for name in ("config", "layout", "provenance", "version")
)
CONFIG_FILE_DIGEST = "himo_config_file_sha256"  # of the JSON file beside, in a directory

# (configuration, weights) of the directories of Hugging Face and open_clip.
HF_FILES = ("config.json", "model.safetensors")
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
_HF_INDEX = "model.safetensors.index.json"

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_JSON = 16 << 20  # bytes of a configuration or an index
_MAX_NAMES = 20  # of each kind in an error message


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    strict: bool = True,
    *,
    stretch: bool = True,
) -> tuple[HiMoCLIP, "Preprocess"]:
    """(model, preprocess): the model of a checkpoint, in evaluation mode, and its preprocessing.

    Reads safetensors and `.pt` files and TorchScript archives of HiMo-CLIP, Long-CLIP, OpenAI's
    CLIP, open_clip (with quick-GELU) and Hugging Face's CLIPModel, and the directories of the
    last two. Nothing in a file is ever executed. The sizes come from the shapes; the heads, which
    no shape tells, are one for 64 channels unless a configuration says otherwise.

    Args:
        path: a file or a directory. Nothing is downloaded.
        device: where the model goes.
        dtype: of the matrix products' weights (see `HiMoCLIP.set_precision`), whatever the file
            holds.
        strict: refuse a file that lacks a tensor, has another one or one of a wrong shape or
            dtype. Otherwise such tensors keep the values of a new model, and a line on the
            standard error names each of them.
        stretch: make 248 text positions of the 77 of a CLIP that is not HiMo's.

    Raises:
        HimoError: the file is missing, damaged, no CLIP or, with strict, does not fit.
    """
    name = os.fspath(path)
    target = usable_device(device)
    state, metadata = read_state_dict(path)
    if stretch and metadata["layout"] != "himo":
        state = stretch_positions(state)
    config = config_of(state, metadata, name)
    model = _build(state, config, strict, name)
    model.provenance = provenance_of(metadata, name)
    if metadata["checksum"] == "none":
        _say(f"note: {name} carries no checksum: damage to its values would go unnoticed")
    from himo.transforms import Preprocess  # images are of no use to those who only convert

    model = model.set_precision(dtype).to(target).eval()
    return model, Preprocess(config.image_resolution)


def save(
    model: HiMoCLIP,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Writes a model to a safetensors file, atomically, and returns the SHA-256 stored in it.

    With the weights go the sizes, the version of himo, and the model's `provenance` with metadata
    on top. Rows of the two tables of text positions that the model never reads are written
    equal to those it reads.

    Args:
        model: the model, not wrapped in anything.
        path: ends in `.safetensors`; replaced if it exists.
        metadata: what else to keep, such as tau and the training data: anything JSON can hold.

    Raises:
        HimoError: another suffix, no model, metadata that JSON cannot hold, or no space.
    """
    if not isinstance(model, HiMoCLIP):
        raise HimoError(f"save: expected model to be a HiMoCLIP, got a {type(model).__name__}")
    name = os.fspath(path)
    if not name.endswith(".safetensors"):
        raise HimoError(
            f"{name}: expected a name ending in .safetensors; `himo convert` writes other formats"
        )
    provenance = {**model.provenance, **(metadata or {})}
    state = from_himo(model.state_dict(), "himo")
    return write_safetensors(name, state, file_metadata(model.config, "himo", provenance))


def read_state_dict(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """(state dict under himo's names, metadata) of a checkpoint, values and dtypes as stored.

    Metadata has `layout`: "himo", "open_clip" (OpenAI's too) or "hf"; `container`:
    "safetensors", "torch", "torchscript" or "torch legacy"; `checksum`: "sha256", "crc32" or
    "none", whichever was verified; `config`: the sizes that the file states, maybe only the
    heads, by name; `provenance`: what `save` was given.

    Raises:
        HimoError: the file is missing, damaged, of an unknown format, or holds anything but
            tensors.
    """
    name = os.fspath(path)
    if not os.path.isdir(name):
        if name in CONFIGS and not os.path.exists(name):
            raise HimoError(
                f"{name}: a model's name and no file: nothing is downloaded, give the path of "
                "a checkpoint"
            )
        tensors, file_data, container = _read_file(name)
        config_bytes = None
    else:
        tensors, file_data, container, config_bytes = _read_directory(name)
    state, layout = to_himo(tensors)
    metadata = {
        "layout": layout,
        "container": container,
        "checksum": _checksum(container, file_data),
        "config": {},
        "provenance": {},
    }
    try:
        if PROVENANCE in file_data:
            metadata["provenance"] = strict_json(file_data[PROVENANCE].encode())
        if CONFIG in file_data:
            metadata["config"] = strict_json(file_data[CONFIG].encode())
    except ValueError as error:
        raise HimoError(f"{name}: its metadata is wrong: {error}") from error
    if config_bytes is not None:
        stored = file_data.get(CONFIG_FILE_DIGEST)
        if stored is not None and stored != sha256(config_bytes).hexdigest():
            raise HimoError(f"{name}: damaged: the configuration is not the one of the weights")
        if layout == "hf" and not metadata["config"]:
            config_file = os.path.join(name, HF_FILES[0])
            metadata["config"] = heads_of_hf(_json(config_bytes, config_file), config_file)
        config_file = os.path.join(name, OPEN_CLIP_FILES[0])
        if layout == "open_clip" and not metadata["config"] and os.path.exists(config_file):
            metadata["config"] = heads_of_open_clip(_json(config_bytes, config_file), config_file)
    return state, metadata


def config_of(state: State, metadata: Mapping[str, Any], path: str) -> CLIPConfig:
    """The sizes that the shapes tell, with the heads of the metadata.

    Raises:
        HimoError: the shapes are no CLIP's, or not those that the metadata states.
    """
    stated = metadata["config"]
    config = deduce_config(state, stated, path)
    if "embed_dim" in stated:  # a whole configuration, not the heads alone
        try:
            expected = CLIPConfig.from_dict(stated).to_dict()
        except HimoError as error:
            raise HimoError(f"{path}: {error}") from error
        actual = config.to_dict()
        for field in expected:
            stretched = field == "context_length" and metadata["layout"] != "himo"
            if actual[field] != expected[field] and not stretched:
                raise HimoError(
                    f"{path}: its configuration has {field} {expected[field]}, its tensors have "
                    f"{actual[field]}"
                )
    return config


def compare(state: State, config: CLIPConfig) -> tuple[list[str], list[str], list[str]]:
    """Names that a model of this configuration (misses, does not know, has in another shape)."""
    with torch.device("meta"):
        expected = HiMoCLIP(config).state_dict()
    missing = [f"{n} {list(expected[n].shape)}" for n in expected if n not in state]
    unexpected = [f"{n} {list(state[n].shape)}" for n in state if n not in expected]
    misshapen = []
    for name in expected.keys() & state.keys():
        got, want = state[name], expected[name]
        if got.shape != want.shape:
            misshapen.append(f"{name} {list(got.shape)}, expected {list(want.shape)}")
        elif got.dtype not in _WEIGHT_DTYPES:
            misshapen.append(f"{name} of {got.dtype}, expected floating point")
    return missing, unexpected, sorted(misshapen)


def require_fit(state: State, config: CLIPConfig, path: str) -> None:
    """Raises HimoError with the lists of `compare` unless all three are empty."""
    lists = []
    for kind, names in zip(
        ("missing", "unexpected", "misshapen"), compare(state, config), strict=True
    ):
        if names:
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            lists.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_NAMES])}{more}")
    if lists:
        raise HimoError(f"{path}: its tensors are not those of a model: {'; '.join(lists)}")


def provenance_of(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What the file says of where it comes from, or for a file of others what it is."""
    return metadata["provenance"] or {
        "source": Path(path).name,
        "source_layout": metadata["layout"],
        "source_container": metadata["container"],
    }


def file_metadata(config: CLIPConfig, layout: str, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that himo writes."""
    try:
        text = json.dumps(provenance, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise HimoError(f"save: expected metadata that JSON can hold: {error}") from error
    return {
        "format": "pt",  # Hugging Face refuses a file that does not say so
        VERSION: __version__,
        LAYOUT: layout,
        CONFIG: json.dumps(config.to_dict()),
        PROVENANCE: text,
    }


def _build(state: State, config: CLIPConfig, strict: bool, path: str) -> HiMoCLIP:
    if strict:
        require_fit(state, config, path)
        with torch.device("meta"):  # nothing to initialise: every tensor comes from the file
            model = HiMoCLIP(config)
        model.load_state_dict(state, assign=True)
        return model
    missing, unexpected, misshapen = compare(state, config)
    for kind, lines in (("missing", missing), ("misshapen", misshapen)):
        for line in lines:
            _say(f"left at its initial value, {kind} in {path}: {line}")
    for line in unexpected:
        _say(f"not used, unexpected in {path}: {line}")
    model = HiMoCLIP(config)
    dropped = {line.split(" ", 1)[0] for line in unexpected + misshapen}
    usable = {name: value for name, value in state.items() if name not in dropped}
    model.load_state_dict(usable, strict=False, assign=True)
    return model


def _read_file(name: str) -> tuple[State, dict[str, str], str]:
    """(tensors, metadata, container) of one file, whose content, not suffix, tells its format."""
    with open_regular(name) as file:
        start = file.read(64)
        file.seek(0)
        if not start:
            raise HimoError(f"{name}: empty")
        # First, because it has no magic number: its header's length may look like another's.
        if start[8:9] == b"{":
            tensors, metadata = read_safetensors(file, name)
            return tensors, metadata, "safetensors"
        if start.startswith(b"PK\x03\x04"):
            return _with_container(read_zip(file, name))
        if start.startswith(b"\x80"):
            return _with_container(read_legacy(file, name))
        if start.startswith(b"version https://git-lfs"):
            raise HimoError(f"{name}: a pointer of Git LFS, not the file: run `git lfs pull`")
        file.seek(257)
        if file.read(5) == b"ustar":
            raise HimoError(f"{name}: a tar archive, which torch wrote before 2017: not read")
    raise HimoError(
        f"{name}: expected a checkpoint (safetensors, .pt, TorchScript), got a file that starts "
        f"with {start[:8]!r}"
    )


def _with_container(result: tuple[State, str]) -> tuple[State, dict[str, str], str]:
    tensors, container = result
    return tensors, {}, container


def _read_directory(name: str) -> tuple[State, dict[str, str], str, bytes]:
    for config, weights in (HF_FILES, OPEN_CLIP_FILES):
        config_path, path = os.path.join(name, config), os.path.join(name, weights)
        index = os.path.join(name, _HF_INDEX)
        if os.path.exists(path):
            return *_read_file(path), _read_small(config_path)
        if weights == HF_FILES[1] and os.path.exists(index):
            return _read_shards(name, index), {}, "safetensors", _read_small(config_path)
    raise HimoError(
        f"{name}: a directory without {HF_FILES[1]} or {OPEN_CLIP_FILES[1]}: expected a checkpoint"
    )


def _read_shards(name: str, index: str) -> State:
    """The tensors that Hugging Face's index assigns to files, each from the file it is said in."""
    weight_map = _json(_read_small(index), index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and os.path.basename(shard) == shard and shard
        for shard in weight_map.values()
    ):
        raise HimoError(f"{index}: expected weight_map to give each tensor a file beside it")
    state: State = {}
    for shard in sorted(set(weight_map.values())):
        tensors, _, _ = _read_file(os.path.join(name, shard))
        expected = {tensor for tensor, file in weight_map.items() if file == shard}
        if set(tensors) != expected:
            wrong = ", ".join(sorted(set(tensors) ^ expected)[:3])
            raise HimoError(
                f"{os.path.join(name, shard)}: holds other tensors than {_HF_INDEX} says: {wrong}"
            )
        state.update(tensors)
    return state


def _read_small(path: str) -> bytes:
    with open_regular(path) as file:
        content = file.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise HimoError(f"{path}: expected at most {_MAX_JSON:,} bytes")
    return content


def _json(content: bytes, path: str) -> dict[str, Any]:
    try:
        return strict_json(content)
    except ValueError as error:
        raise HimoError(f"{path}: not the JSON expected: {error}") from error


def _checksum(container: str, file_data: Mapping[str, str]) -> str:
    if container == "safetensors":
        return "sha256" if DIGEST in file_data else "none"
    return "none" if container == "torch legacy" else "crc32"


def _say(line: str) -> None:
    print(f"himo: {HimoError(line)}", file=sys.stderr)
