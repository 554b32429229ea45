"""`himo convert`: the checkpoint of one project as a checkpoint of another."""

import argparse
import json
import os
import shutil
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from himo.checkpoint.layouts import (
    LAYOUTS,
    State,
    from_himo,
    hf_config,
    open_clip_config,
    stretch_positions,
)
from himo.checkpoint.loading import (
    CONFIG_FILE_DIGEST,
    HF_FILES,
    OPEN_CLIP_FILES,
    config_of,
    file_metadata,
    provenance_of,
    read_state_dict,
    require_fit,
)
from himo.checkpoint.safetensors_files import write_safetensors
from himo.errors import HimoError
from himo.files import atomic_path, hidden_path, open_regular

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def convert(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], to: str = "himo"
) -> None:
    """Writes the checkpoint source as one of another project; no value and no dtype changes.

    A destination ending in `.safetensors`, or in `.pt`, `.pth` or `.bin` for `torch.load`, is one
    file. Any other is a directory that must be new or empty: of a `config.json` and a
    `model.safetensors` for "hf" (`CLIPModel.from_pretrained`), and of open_clip's
    `open_clip_config.json` and weights for "open_clip" (`create_model("local-dir:...")`).

    For "himo" the 77 text positions of a CLIP become 248, as in `load`. For the others they stay
    as many as they are; HiMo-CLIP's two tables become the one that the model reads.

    Raises:
        HimoError: the source is no complete CLIP, or the destination cannot be written.
    """
    if to not in LAYOUTS:
        raise HimoError(f"convert: expected to to be one of {', '.join(LAYOUTS)}, got {to!r}")
    source_name, target = os.fspath(source), os.fspath(destination)
    state, metadata = read_state_dict(source)
    if to == "himo" and metadata["layout"] != "himo":
        state = stretch_positions(state)
    config = config_of(state, metadata, source_name)
    require_fit(state, config, source_name)
    tensors = from_himo(state, to)
    stored = file_metadata(config, to, provenance_of(metadata, source_name))
    if target.endswith(".safetensors"):
        write_safetensors(target, tensors, stored)
    elif target.endswith(_TORCH_SUFFIXES):
        _write_torch(target, tensors)
    elif to == "himo":
        raise HimoError(
            f"{target}: expected a name ending in .safetensors or {', '.join(_TORCH_SUFFIXES)}"
        )
    else:
        files = HF_FILES if to == "hf" else OPEN_CLIP_FILES
        content = hf_config(config) if to == "hf" else open_clip_config(config)
        _write_directory(target, files, content, tensors, stored)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `himo convert`."""
    parser.add_argument("source", help="a checkpoint: a file, or a directory of HF or open_clip")
    parser.add_argument(
        "destination",
        help="a file ending in .safetensors or .pt; for hf and open_clip also a new directory",
    )
    parser.add_argument(
        "--to", choices=LAYOUTS, default="himo", help="whose names to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `himo convert`, says what was written, and returns the exit status."""
    convert(args.source, args.destination, args.to)
    print(f"wrote {args.destination} ({args.to})")
    return 0


def _write_torch(target: str, tensors: State) -> None:
    # Through memory: torch's own writer reports a full disk as "unexpected pos 640 vs 534".
    buffer = BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, buffer)
    with atomic_path(target, needed=buffer.tell()) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _write_directory(
    target: str,
    files: tuple[str, str],
    content: dict[str, Any],
    tensors: State,
    metadata: dict[str, str],
) -> None:
    """Fills a new directory beside target and renames it: it is whole or absent."""
    config_name, weights_name = files
    path = Path(os.path.realpath(target))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HimoError(f"{target}: exists, expected a new or an empty directory")
    temporary = hidden_path(path.parent)
    try:
        temporary.mkdir()
    except OSError as error:
        raise HimoError(f"{target}: cannot be written: {error.strerror}") from error
    try:
        with atomic_path(temporary / config_name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n")
        with open_regular(temporary / config_name) as config:
            digest = sha256(config.read()).hexdigest()
        weights = str(temporary / weights_name)
        write_safetensors(weights, tensors, {**metadata, CONFIG_FILE_DIGEST: digest})
        temporary.rename(path)
    except HimoError as error:
        raise HimoError(str(error).replace(str(temporary), target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
