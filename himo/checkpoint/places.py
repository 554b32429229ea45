"""Finds and reads the weights and configurations of a checkpoint, a file or a directory."""

import os
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from himo.checkpoint import configurations
from himo.checkpoint.configurations import Stated
from himo.checkpoint.safetensors_files import MAX_TENSORS, read_safetensors
from himo.checkpoint.strict_json import MAX_JSON, read_json
from himo.checkpoint.torch_files import Weights, read_legacy, read_zip
from himo.clip_config import CONFIGS
from himo.errors import HimoError, quoted, shortened
from himo.files import open_regular
from himo.tokenizer import read_symbols

# (configuration, weights) of the directories that himo writes.
HF_FILES = ("config.json", "model.safetensors")
OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
CONFIG_FILE_DIGEST = "himo_config_file_sha256"  # key in the weights' metadata
PREPROCESSOR_FILE, TOKENIZER_FILE = "preprocessor_config.json", "tokenizer_config.json"
MERGES_FILE = "merges.txt"
_WHOLE_TOKENIZER = "tokenizer.json"  # newer versions have the merges in it
_MAX_TOKENIZER = 4 << 20  # bytes of one; CLIP's takes 3.6 million
_PROCESSOR_FILE = "processor_config.json"  # newer versions have the image processor in it
_CONFIGURATIONS = (
    *(HF_FILES[0], OPEN_CLIP_FILES[0], PREPROCESSOR_FILE, _PROCESSOR_FILE),
    *(TOKENIZER_FILE, MERGES_FILE, _WHOLE_TOKENIZER),
)

# Weights in a directory, in the order in which they are looked for.
_WEIGHTS = (HF_FILES[1], "pytorch_model.bin", OPEN_CLIP_FILES[1], "open_clip_pytorch_model.bin")
_INDEX = ".index.json"  # suffix after the name of weights in several files
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_OF_OTHERS = (".h5", ".msgpack", ".onnx")  # suffixes of weights that no torch wrote
_SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}(\.\w+)")  # weights in several files


def find(name: str) -> Weights:
    """The weights of a checkpoint; HimoError where there are none, or they are damaged."""
    if not os.path.isdir(name):
        if name in CONFIGS and not os.path.exists(name):
            raise HimoError(
                f"{name}: a model's name and no file: nothing is downloaded, give the path of "
                "a checkpoint"
            )
        if name.endswith(_INDEX) or _SHARD.fullmatch(name):
            raise HimoError(
                f"{name}: a part of weights in several files: expected their directory, "
                f"{os.path.dirname(name) or '.'}"
            )
        return _read_file(name)
    for weights in _WEIGHTS:
        path = os.path.join(name, weights)
        if os.path.exists(path):
            return _read_file(path)
        if os.path.exists(path + _INDEX):
            return _read_shards(name, path + _INDEX)
    raise HimoError(
        f"{name}: a directory without {', '.join(_WEIGHTS)}: expected a checkpoint{_there(name)}"
    )


def files_of(name: str) -> list[str]:
    """The files that `find` and `configuration` may read for a checkpoint, of those there are."""
    if not os.path.isdir(name):
        files, directory = [name], os.path.dirname(name)
    else:
        directory = name
        weights = (*_WEIGHT_SUFFIXES, _INDEX)
        files = [os.path.join(name, file) for file in os.listdir(name) if file.endswith(weights)]
    files += [os.path.join(directory, file) for file in _CONFIGURATIONS]
    return [file for file in sorted(files) if os.path.isfile(file)]


def _there(directory: str) -> str:
    """What a directory without a checkpoint has in its place, as the end of a message."""
    files = sorted(os.listdir(directory))
    for file in files:
        if shard := _SHARD.fullmatch(file):
            return f"; there is {quoted(file)} without its index, {shard[1]}{shard[2]}{_INDEX}"
    below = [
        f"{folder}/{file}"
        for folder in files
        if os.path.isdir(path := os.path.join(directory, folder)) and os.access(path, os.R_OK)
        for file in sorted(os.listdir(path))
    ]
    for found, then in (
        ([file for file in files if file.endswith(_WEIGHT_SUFFIXES)], "name the file"),
        ([file for file in below if file.endswith(_WEIGHT_SUFFIXES)], "name the file"),
        ([file for file in files if file.endswith(_OF_OTHERS)], "not read"),
    ):
        if found:
            return f"; there is {', '.join(map(quoted, found[:3]))}: {then}"
    return ""


def configuration(name: str, layout: str, metadata: Mapping[str, str]) -> Stated:
    """The fields of CLIPConfig that the configurations of a checkpoint state.

    They are in its directory, or next to its file.

    Args:
        name: the file or directory.
        layout: of the weights; decides which project's configurations are looked for.
        metadata: of the weights, which may have the digest of the configuration.

    Raises:
        HimoError: a configuration is of a model that himo does not compute, or of other weights;
            or a directory has none.
    """
    directory = name if os.path.isdir(name) else os.path.dirname(os.path.abspath(name))

    def read(file: str, of: Callable[[Mapping[str, Any], str], Any]) -> Any:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            return None
        content, data = read_json(path)
        digest = metadata.get(CONFIG_FILE_DIGEST) if file == config_file else None
        if digest is not None and digest != sha256(data).hexdigest():
            raise HimoError(f"{name}: damaged: {file} is not the configuration of the weights")
        try:
            return of(content, path)
        except RecursionError as error:  # in a comparison of JSON that was just not too deep
            raise HimoError(f"{path}: JSON too deep") from error

    config_file = {"hf": HF_FILES[0], "open_clip": OPEN_CLIP_FILES[0]}.get(layout)
    if config_file is None:
        return {}
    is_hf = layout == "hf"
    stated: Stated | None = read(
        config_file, configurations.of_hugging_face if is_hf else configurations.of_open_clip
    )
    if stated is None:
        if directory == name:
            raise HimoError(f"{name}: a directory without {config_file}, which its weights need")
        return {}
    if is_hf:
        read(TOKENIZER_FILE, configurations.require_clip_tokenizer)
        _require_clip_merges(directory)
        for file in (PREPROCESSOR_FILE, _PROCESSOR_FILE):
            images = read(file, configurations.of_image_processor) or {}
            stated = configurations.merged(stated, images, f"{name}: {file}", config_file)
    return stated


def _require_clip_merges(directory: str) -> None:
    """Raises HimoError if the directory has merges of another tokenizer than CLIP's."""
    wrong = "expected the merges of CLIP's tokenizer: himo has no other"
    ours = read_symbols()[2]
    path = os.path.join(directory, MERGES_FILE)
    if os.path.exists(path):
        with open_regular(path) as file:
            lines = file.read(MAX_JSON).splitlines()
        if lines and lines[0].startswith(b"#version"):
            lines = lines[1:]
        if lines != [merge.encode() for merge in ours]:
            raise HimoError(f"{path}: {wrong}")
    path = os.path.join(directory, _WHOLE_TOKENIZER)
    if os.path.exists(path):
        model = read_json(path, _MAX_TOKENIZER)[0].get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        # A merge is one text, or two in newer files.
        if merges not in (ours, [merge.split(" ") for merge in ours]):
            raise HimoError(f"{path}: {wrong}")


def _read_file(name: str) -> Weights:
    """The weights in one file. Its content, not its suffix, tells the format."""
    with open_regular(name) as file:
        start = file.read(64)
        file.seek(0)
        if not start:
            raise HimoError(f"{name}: empty")
        # First, because it has no magic number: its first bytes, a length, may look like another's.
        if start[8:9] == b"{":
            tensors, metadata = read_safetensors(file, name)
            return Weights(tensors, "safetensors", metadata)
        if start.startswith(b"PK\x03\x04"):
            return read_zip(file, name)
        if start.startswith(b"\x80"):
            return read_legacy(file, name)
        if start.startswith(b"version https://git-lfs"):
            raise HimoError(f"{name}: a pointer of Git LFS, not the file: run `git lfs pull`")
        file.seek(257)
        if file.read(5) == b"ustar":
            raise HimoError(f"{name}: a tar archive, which torch wrote before 2017: not read")
    raise HimoError(
        f"{name}: expected a checkpoint (safetensors, .pt, TorchScript), got a file that starts "
        f"with {start[:8]!r}"
    )


def _read_shards(name: str, index: str) -> Weights:
    """The weights in the files of Hugging Face's index, which says what tensors each must have."""
    weight_map = read_json(index)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and os.path.basename(shard) == shard and shard
        for shard in weight_map.values()
    ):
        raise HimoError(f"{index}: expected weight_map to give each tensor a file beside it")
    if len(weight_map) > MAX_TENSORS:
        raise HimoError(f"{index}: expected at most {MAX_TENSORS:,} tensors, got {len(weight_map)}")
    expected: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        expected.setdefault(shard, set()).add(tensor)
    found = Weights({}, "none")
    for shard in sorted(expected):
        path = os.path.join(name, shard)
        part = _read_file(path)
        if set(part.tensors) != expected[shard]:
            wrong = ", ".join(map(shortened, sorted(set(part.tensors) ^ expected[shard])[:3]))
            raise HimoError(
                f"{path}: holds other tensors than {os.path.basename(index)} says: {wrong}"
            )
        found.tensors.update(part.tensors)
        found.container = part.container
    return found
