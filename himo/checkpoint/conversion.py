"""`himo convert`: writes the checkpoint of one project in the format of another."""

import argparse
import json
import os
from collections.abc import Mapping
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from himo.checkpoint.configurations import (
    hf_config,
    hf_preprocessor_config,
    hf_tokenizer_config,
    open_clip_config,
)
from himo.checkpoint.layouts import LAYOUTS, State, from_himo
from himo.checkpoint.loading import (
    add_model_arguments,
    file_metadata,
    files_of,
    model_arguments,
    provenance_of,
    read_model,
    require_fit,
    say_what_is_open,
)
from himo.checkpoint.places import (
    CONFIG_FILE_DIGEST,
    HF_FILES,
    MERGES_FILE,
    OPEN_CLIP_FILES,
    PREPROCESSOR_FILE,
    TOKENIZER_FILE,
)
from himo.checkpoint.safetensors_files import write_safetensors
from himo.clip_config import CLIPConfig
from himo.errors import HimoError
from himo.files import atomic_path, hidden_directory, keep_inputs, write_text
from himo.tokenizer import END_OF_TEXT, read_symbols

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str = "himo",
    *,
    stretch: bool = False,
    activation: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> None:
    """Writes a checkpoint in the format of another project; no value and no dtype changes.

    A destination ending in `.safetensors`, or in `.pt`, `.pth` or `.bin` for `torch.load`, is one
    file. Any other is a directory that must be new or empty. One for "hf" is complete: `CLIPModel`
    and `AutoProcessor` open it with `from_pretrained`, the processor if the vocabulary is CLIP's.
    Hugging Face's processor differs from himo's in three ways: pixels become RGB before they are
    resized; the crop starts a pixel earlier where an odd number of pixels is cut off; and texts
    are not repaired (ftfy, HTML entities) before they are cut.
    A directory for "open_clip" has the configuration and the weights that
    `create_model("local-dir:...")` reads. HiMo-CLIP's two tables of text positions become the one
    that the model reads.

    Args:
        source, destination: paths.
        to: "himo", "open_clip" or "hf".
        stretch: make 248 text positions of the 77 of a CLIP, as in `load`.
        activation, vision_heads, text_heads: fields that the source does not state, as in `load`.

    Raises:
        HimoError: the source is no complete CLIP, or the destination cannot be written.
    """
    if to not in LAYOUTS:
        raise HimoError(f"convert: expected `to` to be one of {', '.join(LAYOUTS)}, got {to!r}")
    source_name, target = os.fspath(source), os.fspath(destination)
    keep_inputs(target, [Path(target)], files_of(source_name))
    given = {"activation": activation, "vision_heads": vision_heads, "text_heads": text_heads}
    state, config, metadata = read_model(source_name, given, stretch)
    require_fit(state, config, source_name)
    say_what_is_open(metadata, given, source_name)
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
    elif to == "hf":
        texts = {HF_FILES[0]: _json(hf_config(config)), **_processor_files(config)}
        _write_directory(target, texts, HF_FILES[1], tensors, stored)
    else:
        texts = {OPEN_CLIP_FILES[0]: _json(open_clip_config(config))}
        _write_directory(target, texts, OPEN_CLIP_FILES[1], tensors, stored)


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
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs `himo convert` and returns the exit status."""
    convert(args.source, args.destination, args.to, **model_arguments(args))
    print(f"wrote {args.destination} ({args.to})")
    return 0


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _processor_files(config: CLIPConfig) -> dict[str, str]:
    """The texts of the files that Hugging Face's AutoProcessor reads, by file name."""
    files = {PREPROCESSOR_FILE: _json(hf_preprocessor_config(config))}
    if config.vocab_size == END_OF_TEXT + 1:  # CLIP's, the only tokenizer of himo
        _, ids, merges = read_symbols()
        files[TOKENIZER_FILE] = _json(hf_tokenizer_config(config))
        files["vocab.json"] = json.dumps(ids, ensure_ascii=False)
        files[MERGES_FILE] = "\n".join(["#version: 0.2", *merges, ""])
    return files


def _write_torch(target: str, tensors: State) -> None:
    # Through memory: torch's own writer reports a full disk as "unexpected pos 640 vs 534".
    buffer = BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, buffer)
    with atomic_path(target, needed=buffer.tell()) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _write_directory(
    target: str,
    texts: Mapping[str, str],
    weights: str,
    tensors: State,
    metadata: dict[str, str],
) -> None:
    """Fills a hidden directory next to target and renames it, so that target is whole or absent.

    The first of the texts is the configuration, whose digest the weights store.
    """
    path = Path(os.path.realpath(target))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise HimoError(f"{target}: exists, expected a new or an empty directory")
    digest = sha256(next(iter(texts.values())).encode()).hexdigest()
    metadata = {**metadata, CONFIG_FILE_DIGEST: digest}
    try:
        with hidden_directory(path.parent) as temporary:
            try:
                for name, text in texts.items():
                    write_text(temporary / name, text)
                write_safetensors(str(temporary / weights), tensors, metadata)
            except HimoError as error:
                raise HimoError(str(error).replace(str(temporary), target)) from error
            temporary.rename(path)
    except OSError as error:
        raise HimoError(f"{target}: cannot be written: {error.strerror}") from error
