"""Loads a `HiMoCLIP` from any known file, and saves one as safetensors."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from himo.checkpoint import places
from himo.checkpoint.configurations import Stated, merged
from himo.checkpoint.hub import located
from himo.checkpoint.layouts import (
    POSITIONS,
    State,
    deduce_config,
    from_himo,
    stretch_positions,
    to_himo,
)
from himo.checkpoint.safetensors_files import DIGEST, write_safetensors
from himo.checkpoint.strict_json import MAX_JSON, strict_json
from himo.clip_config import ACTIVATIONS, UNSHAPED, CLIPConfig
from himo.device import usable_device
from himo.errors import HimoError, note, printable, quoted, shortened
from himo.files import sha256_file
from himo.flags import flag
from himo.model import HiMoCLIP
from himo_kernels import __version__

if TYPE_CHECKING:
    from himo.transforms import Preprocess

# Keys of the metadata in the safetensors files that himo writes; write_safetensors adds the digest.
_CONFIG, _PROVENANCE = "himo_config", "himo_provenance"

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_NAMES = 8  # of each kind in an error message
_MOST_INITIAL = 2  # without strict, a model has at most this many times the values of its file
# Fields of CLIPConfig that a file may not state: `load` takes them by name, the command line as
# flags with this help.
CHOICES = {
    "activation": "of the model, where the file does not state it",
    "vision_heads": "attention heads of the image tower, where the file does not state them",
    "text_heads": "attention heads of the text tower, where the file does not state them",
}
MODEL_ARGUMENTS = (*CHOICES, "stretch")  # of `load`, which have flags


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    strict: bool = True,
    *,
    stretch: bool = False,
    activation: str | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> tuple[HiMoCLIP, "Preprocess"]:
    """(model, preprocess): the model of a checkpoint, in evaluation mode, and its preprocessing.

    Reads safetensors and `.pt` files and TorchScript archives of HiMo-CLIP, Long-CLIP, OpenAI's
    CLIP, open_clip and Hugging Face's CLIPModel, and directories of the last two. No file is ever
    executed. The sizes come from the shapes. What no shape tells (the heads, the activation, the
    preprocessing) comes from the configuration in the file, in the directory, or next to a file of
    open_clip or Hugging Face. A configuration of something that himo does not compute is refused
    by name. Without a configuration, a line on the standard error says what is assumed: one head
    for each 64 channels, quick-GELU and CLIP's preprocessing.

    Args:
        path: a file, a directory, or a name in the hub's local cache (`himo.checkpoint.hub`).
            Nothing is downloaded.
        device: where the model goes.
        dtype: of the matrix products' weights (see `HiMoCLIP.set_precision`), whatever the file's.
        strict: refuse a file with a missing or unexpected tensor, or one of a wrong shape or
            dtype. Otherwise such tensors keep the values of a new model, and a line on the
            standard error names each of them.
        stretch: make 248 text positions of the 77 of a CLIP, as training does. Otherwise texts of
            such a CLIP end at 77 tokens.
        activation, vision_heads, text_heads: fields of CLIPConfig that the file does not state.

    Raises:
        HimoError: the file is missing, damaged, no CLIP or, with strict, does not fit; it is of
            a model that himo does not compute; or it states another value than the one given.
    """
    name = os.fspath(path)
    target = usable_device(device)
    given = {"activation": activation, "vision_heads": vision_heads, "text_heads": text_heads}
    state, config, metadata = read_model(name, given, stretch)
    model = _build(state, config, strict, name)
    model.provenance = provenance_of(metadata, name)
    say_what_is_open(metadata, given, name)
    if metadata["checksum"] == "none":
        note(f"{name} carries no checksum: damage to its values would go unnoticed")
    from himo.transforms import Preprocess  # here: `himo convert` needs no image libraries

    model = model.set_precision(dtype).to(target).eval()
    return model, Preprocess.of(config)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field that a checkpoint may not state; `model_arguments` reads them."""
    for name, text in CHOICES.items():
        if name == "activation":
            parser.add_argument(flag(name), choices=ACTIVATIONS, help=text)
        else:
            parser.add_argument(flag(name), type=int, metavar="N", help=text)
    parser.add_argument(
        "--stretch",
        action="store_true",
        help="make 248 text positions of the 77 of a CLIP, as training does",
    )


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that the flags of `add_model_arguments` give."""
    return {name: getattr(args, name) for name in MODEL_ARGUMENTS}


def save(
    model: HiMoCLIP,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Writes a model to a safetensors file, atomically, and returns the SHA-256 stored in it.

    The file also holds the sizes, the version of himo, and the model's `provenance` updated with
    metadata. The model reads each row of text positions from one of two tables; both are written
    with that row.

    Args:
        model: the model, without DDP or another wrapper.
        path: ends in `.safetensors`; replaced if it exists.
        metadata: anything else that JSON can hold, such as tau and the training data.

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


def digest(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a checkpoint's file; for a directory, of the digests of its files."""
    place = Path(located(os.fspath(path)))
    files = [place] if place.is_file() else sorted(x for x in place.iterdir() if x.is_file())
    digests = [sha256_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return sha256("".join(digests).encode()).hexdigest()


def files_of(path: str | os.PathLike[str]) -> list[str]:
    """The files of a checkpoint, its configurations among them; those that are there."""
    return places.files_of(located(os.fspath(path)))


def read_state_dict(path: str | os.PathLike[str]) -> tuple[State, dict[str, Any]]:
    """(state dict under himo's names, metadata) of a checkpoint, values and dtypes as stored.

    Metadata has `layout`: "himo", "open_clip" (OpenAI's too) or "hf"; `container`:
    "safetensors", "torch", "torchscript" or "torch legacy"; `checksum`: "sha256", "crc32" or
    "none", whichever was verified; `config`: the fields of CLIPConfig that the file or its
    configuration states; `provenance`: what `save` was given; `notes`: sentences for the user on
    what was left out.

    Raises:
        HimoError: the file is missing, damaged, of an unknown format, or without tensors by name;
            or a configuration is of a model that himo does not compute.
    """
    name = located(os.fspath(path))
    found = places.find(name)
    stored = found.metadata
    try:
        state, layout, notes = to_himo(found.tensors)
    except ValueError as error:
        raise HimoError(f"{name}: not read: {error}") from error
    try:
        provenance = strict_json(stored[_PROVENANCE].encode()) if _PROVENANCE in stored else {}
        of_file: Stated = {}
        if _CONFIG in stored:
            of_file = CLIPConfig.from_dict(strict_json(stored[_CONFIG].encode())).to_dict()
    except ValueError as error:
        raise HimoError(f"{name}: its metadata is wrong: {error}") from error
    # A file that himo wrote states every field.
    complete = of_file and not os.path.isdir(name)
    others = {} if complete else places.configuration(name, layout, stored)
    has_crc32 = found.container in ("torch", "torchscript")
    return state, {
        "layout": layout,
        "container": found.container,
        "checksum": "sha256" if DIGEST in stored else "crc32" if has_crc32 else "none",
        "config": merged(of_file, others, name, "the weights' metadata"),
        "provenance": provenance,
        "notes": [*found.notes, *notes],
    }


def read_model(
    path: str, given: Mapping[str, Any], stretch: bool
) -> tuple[State, CLIPConfig, dict[str, Any]]:
    """(state dict, configuration, metadata) of a checkpoint; arguments and errors as in `load`."""
    state, metadata = read_state_dict(path)
    config = config_of(state, metadata, path, given)
    if stretch:
        state = stretch_positions(state)
        config = replace(config, context_length=state[POSITIONS].shape[0])
    return state, config, metadata


def config_of(
    state: State, metadata: Mapping[str, Any], path: str, given: Mapping[str, Any] | None = None
) -> CLIPConfig:
    """The configuration that the shapes, the metadata and the user's choices state together.

    Raises:
        HimoError: the shapes are no CLIP's, or two of the three differ.
    """
    stated = metadata["config"]
    chosen = {name: value for name, value in (given or {}).items() if value is not None}
    config = deduce_config(state, merged(chosen, stated, path, "what was given"), path)
    for field, value in stated.items():
        actual = getattr(config, field, None)
        if field not in UNSHAPED and value != actual:
            raise HimoError(
                f"{path}: its configuration has {shortened(field)} {quoted(value)}, its tensors "
                f"have {quoted(actual)}"
            )
    return config


def say_what_is_open(metadata: Mapping[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Prints to stderr what was left out of a checkpoint, and what had to be assumed of it."""
    for line in metadata["notes"]:
        note(f"{path} {line}")
    known = {*metadata["config"], *(name for name, value in given.items() if value is not None)}
    assumed = {
        "heads (assumed: one for 64 channels)": {"vision_heads", "text_heads"},
        "activation (quick_gelu)": {"activation"},
        "preprocessing (CLIP's)": {"image_mean"},
    }
    if unknown := [text for text, fields in assumed.items() if not fields <= known]:
        note(f"{path} does not state its {', '.join(unknown)}")


def compare(state: State, config: CLIPConfig) -> dict[str, list[str]]:
    """The tensors that are missing, unexpected and misshapen for a model, with their shapes."""
    with torch.device("meta"):
        expected = HiMoCLIP(config).state_dict()
    misshapen = []
    for name in expected.keys() & state.keys():
        got, want = state[name], expected[name]
        if got.shape != want.shape:
            misshapen.append(f"{name} {list(got.shape)}, expected {list(want.shape)}")
        elif got.dtype not in _WEIGHT_DTYPES:
            misshapen.append(f"{name} of {got.dtype}, expected floating point")
    return {
        "missing": [f"{n} {list(expected[n].shape)}" for n in expected if n not in state],
        "unexpected": [
            f"{shortened(n)} {list(state[n].shape)}" for n in state if n not in expected
        ],
        "misshapen": sorted(misshapen),
    }


def require_fit(state: State, config: CLIPConfig, path: str) -> None:
    """Raises HimoError with the lists of `compare` unless all three are empty."""
    lists = []
    for kind, names in compare(state, config).items():
        if names:
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            lists.append(f"{len(names)} {kind}: {', '.join(names[:_MAX_NAMES])}{more}")
    if lists:
        raise HimoError(f"{path}: its tensors are not those of a model: {'; '.join(lists)}")


def provenance_of(metadata: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Where the weights come from, as himo's file says; the name and format of another's file."""
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
    if len(text) > MAX_JSON:
        raise HimoError(f"save: expected at most {MAX_JSON:,} bytes of metadata, got {len(text):,}")
    return {
        "format": "pt",  # Hugging Face refuses a file that does not say so
        "himo_version": __version__,
        "himo_layout": layout,
        _CONFIG: json.dumps(config.to_dict()),
        _PROVENANCE: text,
    }


def _build(state: State, config: CLIPConfig, strict: bool, path: str) -> HiMoCLIP:
    if strict:
        require_fit(state, config, path)
        with torch.device("meta"):  # every tensor comes from the file: initialise none
            model = HiMoCLIP(config)
        model.load_state_dict(state, assign=True)
        return model
    wrong = compare(state, config)
    for kind in ("missing", "misshapen"):
        for line in wrong[kind]:
            _say(f"left at its initial value, {kind} in {path}: {line}")
    for line in wrong["unexpected"]:
        _say(f"not used, unexpected in {path}: {line}")
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in HiMoCLIP(config).state_dict().values())
    if wanted > _MOST_INITIAL * sum(tensor.numel() for tensor in state.values()):
        raise HimoError(f"{path}: less than half of a model of {wanted:,} values")
    model = HiMoCLIP(config)
    dropped = {line.split(" ", 1)[0] for line in wrong["misshapen"]}
    usable = {name: value for name, value in state.items() if name not in dropped}
    model.load_state_dict(usable, strict=False, assign=True)
    return model


def _say(line: str) -> None:
    print(f"himo: {printable(line)}", file=sys.stderr)
