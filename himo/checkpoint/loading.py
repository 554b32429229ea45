"""Loads and saves models: any known file to a `HiMoCLIP`, and a `HiMoCLIP` to safetensors."""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from himo.checkpoint import places
from himo.checkpoint.configurations import Stated, merged
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
from himo.errors import HimoError, quoted, shortened
from himo.model import HiMoCLIP
from himo_kernels import __version__

if TYPE_CHECKING:
    from himo.transforms import Preprocess

# Metadata of the safetensors files that himo writes; the digest is added to them.
CONFIG, LAYOUT, PROVENANCE, VERSION = (
    f"himo_{name}" for name in ("config", "layout", "provenance", "version")
)

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_NAMES = 8  # of each kind in an error message
_MOST_INITIAL = 2  # how many times the values in a file a model may have that is not all there
# What a file may leave open and its user may choose: the fields of CLIPConfig, for `load` by the
# same name and for the command line with a help.
CHOICES = {
    "activation": "of the model, where the file does not state it",
    "vision_heads": "attention heads of the image tower, where the file does not state them",
    "text_heads": "attention heads of the text tower, where the file does not state them",
}


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
    CLIP, open_clip and Hugging Face's CLIPModel, and the directories of the last two. Nothing in a
    file is ever executed. The sizes come from the shapes. What no shape tells (the heads, the
    activation, the preprocessing) comes from the configuration that is in the file, in the
    directory, or beside a file of either; what a configuration states and himo does not compute is
    refused by its name. Where there is none, the standard error says in a line what is assumed:
    one head for 64 channels, quick-GELU and CLIP's preprocessing.

    Args:
        path: a file or a directory. Nothing is downloaded.
        device: where the model goes.
        dtype: of the matrix products' weights (see `HiMoCLIP.set_precision`), whatever the file
            holds.
        strict: refuse a file that lacks a tensor, has another one or one of a wrong shape or
            dtype. Otherwise such tensors keep the values of a new model, and a line on the
            standard error names each of them.
        stretch: make 248 text positions of the 77 of a CLIP, as training does. Otherwise a CLIP
            is what it was, and its texts end at 77 tokens.
        activation, vision_heads, text_heads: what the file does not state; fields of CLIPConfig.

    Raises:
        HimoError: the file is missing, damaged, no CLIP or, with strict, does not fit; it is of
            a model that himo does not compute; or it states another value than the one given.
    """
    name = os.fspath(path)
    target = usable_device(device)
    state, metadata = read_state_dict(path)
    given = {"activation": activation, "vision_heads": vision_heads, "text_heads": text_heads}
    config = config_of(state, metadata, name, given)
    if stretch:
        state, config = stretched(state, config)
    model = _build(state, config, strict, name)
    model.provenance = provenance_of(metadata, name)
    say_what_is_open(metadata, given, name)
    if metadata["checksum"] == "none":
        _say(f"note: {name} carries no checksum: damage to its values would go unnoticed")
    from himo.transforms import Preprocess  # images are of no use to those who only convert

    model = model.set_precision(dtype).to(target).eval()
    return model, Preprocess.of(config)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for what a checkpoint may leave open; `model_arguments` reads them."""
    for name, text in CHOICES.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "activation":
            parser.add_argument(flag, choices=ACTIVATIONS, help=text)
        else:
            parser.add_argument(flag, type=int, metavar="N", help=text)
    parser.add_argument(
        "--stretch",
        action="store_true",
        help="make 248 text positions of the 77 of a CLIP, as training does",
    )


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load` that the flags of `add_model_arguments` give."""
    return {name: getattr(args, name) for name in (*CHOICES, "stretch")}


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
    "none", whichever was verified; `config`: the fields of CLIPConfig that the file, or a
    configuration with it, states; `provenance`: what `save` was given; `notes`: what to say of how
    it was read.

    Raises:
        HimoError: the file is missing, damaged, of an unknown format, or without tensors by name;
            or a configuration is of a model that himo does not compute.
    """
    name = os.fspath(path)
    found = places.find(name)
    stored = found.metadata
    try:
        state, layout, notes = to_himo(found.tensors)
    except ValueError as error:
        raise HimoError(f"{name}: not read: {error}") from error
    try:
        provenance = strict_json(stored[PROVENANCE].encode()) if PROVENANCE in stored else {}
        of_file: Stated = {}
        if CONFIG in stored:
            of_file = CLIPConfig.from_dict(strict_json(stored[CONFIG].encode())).to_dict()
    except ValueError as error:
        raise HimoError(f"{name}: its metadata is wrong: {error}") from error
    # A file that himo wrote says all itself.
    alone = of_file and not os.path.isdir(name)
    beside = {} if alone else places.configuration(name, layout, stored)
    return state, {
        "layout": layout,
        "container": found.container,
        "checksum": _checksum(found.container, stored),
        "config": merged(of_file, beside, name, "the weights' metadata"),
        "provenance": provenance,
        "notes": [*found.notes, *notes],
    }


def config_of(
    state: State, metadata: Mapping[str, Any], path: str, given: Mapping[str, Any] | None = None
) -> CLIPConfig:
    """The configuration: what the shapes tell, what the metadata state, and what the user gives.

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


def stretched(state: State, config: CLIPConfig) -> tuple[State, CLIPConfig]:
    """Both with CLIP's 77 text positions stretched to 248; with any other number as they are."""
    state = stretch_positions(state)
    return state, replace(config, context_length=state[POSITIONS].shape[0])


def say_what_is_open(metadata: Mapping[str, Any], given: Mapping[str, Any], path: str) -> None:
    """Says how a checkpoint was read, and what neither it nor its user states, on stderr."""
    for line in metadata["notes"]:
        _say(f"note: {path} {line}")
    known = {*metadata["config"], *(name for name, value in given.items() if value is not None)}
    assumed = {
        "heads (assumed: one for 64 channels)": {"vision_heads", "text_heads"},
        "activation (quick_gelu)": {"activation"},
        "preprocessing (CLIP's)": {"image_mean"},
    }
    if unknown := [text for text, fields in assumed.items() if not fields <= known]:
        _say(f"note: {path} does not state its {', '.join(unknown)}")


def compare(state: State, config: CLIPConfig) -> tuple[list[str], list[str], list[str]]:
    """Names that a model of this configuration (misses, does not know, has in another shape)."""
    with torch.device("meta"):
        expected = HiMoCLIP(config).state_dict()
    missing = [f"{n} {list(expected[n].shape)}" for n in expected if n not in state]
    unexpected = [f"{shortened(n)} {list(state[n].shape)}" for n in state if n not in expected]
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
    if len(text) > MAX_JSON:
        raise HimoError(f"save: expected at most {MAX_JSON:,} bytes of metadata, got {len(text):,}")
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
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in HiMoCLIP(config).state_dict().values())
    if wanted > _MOST_INITIAL * sum(tensor.numel() for tensor in state.values()):
        raise HimoError(f"{path}: less than half of a model of {wanted:,} values")
    model = HiMoCLIP(config)
    dropped = {line.split(" ", 1)[0] for line in misshapen}
    usable = {name: value for name, value in state.items() if name not in dropped}
    model.load_state_dict(usable, strict=False, assign=True)
    return model


def _checksum(container: str, file_data: Mapping[str, str]) -> str:
    if container == "safetensors":
        return "sha256" if DIGEST in file_data else "none"
    return "none" if container == "torch legacy" else "crc32"


def _say(line: str) -> None:
    print(f"himo: {HimoError(line)}", file=sys.stderr)
