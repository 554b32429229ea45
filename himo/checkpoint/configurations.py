"""Reads and writes the configurations of Hugging Face and open_clip, which lie next to weights.

A field is used, or checked to be what himo computes, or refused by its name: a field that is not
known here may change every feature.
"""

from collections.abc import Mapping
from typing import Any

from himo.checkpoint.configuration_fields import (
    ANY,
    HF_MODEL,
    HF_PREPROCESSOR,
    HF_TEXT,
    HF_VISION,
    OPEN_CLIP_MODEL,
    OPEN_CLIP_PREPROCESS,
    OPEN_CLIP_TEXT,
    OPEN_CLIP_VISION,
    Fields,
)
from himo.clip_config import ACTIVATIONS, MEAN, STD, CLIPConfig
from himo.errors import HimoError, quoted, shortened

Stated = dict[str, Any]  # fields of CLIPConfig

_CLIP_IMAGES: Stated = {"image_mean": [*MEAN], "image_std": [*STD]}
_HF_PROCESSOR = {"processor_class", "image_processor", "tokenizer"}
_HF_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}  # as Hugging Face numbers them


def of_open_clip(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that open_clip's `open_clip_config.json` states.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    model = config.get("model_cfg")
    model = model if isinstance(model, dict) else {}
    vision, text = model.get("vision_cfg"), model.get("text_cfg")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise HimoError(f"{path}: not the configuration of a CLIP of open_clip")
    preprocess = config.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise HimoError(
            f"{path}: expected preprocess_cfg to be an object, got {quoted(preprocess)}"
        )
    stated = (
        _stated(model, "model_cfg", OPEN_CLIP_MODEL, path)
        | _stated(vision, "vision_cfg", OPEN_CLIP_VISION, path)
        | _stated(text, "text_cfg", OPEN_CLIP_TEXT, path)
    )
    images = _stated(preprocess, "preprocess_cfg", OPEN_CLIP_PREPROCESS, path)
    stated = merged(stated, images, f"{path}: preprocess_cfg", "vision_cfg")
    if stated.get("interpolation") == "random":  # in training; open_clip encodes with bicubic
        stated["interpolation"] = "bicubic"
    width, head_width = vision.get("width", 768), vision.get("head_width", 64)
    if not all(type(value) is int and value > 0 for value in (width, head_width)):
        raise HimoError(
            f"{path}: expected vision_cfg.width and head_width to be positive integers, "
            f"got {quoted(width)} and {quoted(head_width)}"
        )
    return {
        "text_heads": 8,  # this and the next three are open_clip's defaults
        **_CLIP_IMAGES,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        **stated,
        "vision_heads": width // head_width,
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
    }


def of_hugging_face(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that Hugging Face's `config.json` of a CLIPModel states.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    towers: dict[str, Any] = {tower: config.get(f"{tower}_config") for tower in ("vision", "text")}
    for tower, part in towers.items():
        if not isinstance(part, dict):
            raise HimoError(f"{path}: not the configuration of a CLIPModel: no {tower}_config")
        # Old versions write the same fields under this name; some write both.
        earlier = config.get(f"{tower}_config_dict")
        for key, value in earlier.items() if isinstance(earlier, dict) else ():
            if part.get(key) != value:
                raise HimoError(f"{path}: two values of {shortened(key)} for the {tower} tower")
    vision, text = towers.values()
    stated = _stated(config, "", HF_MODEL, path)
    for tower, fields, heads in (("vision", HF_VISION, 12), ("text", HF_TEXT, 8)):
        part = _stated(towers[tower], f"{tower}_config", fields, path)
        part.pop("embed_dim", None)  # used by a tower without the other; the model has its own
        stated |= {f"{tower}_heads": heads} | part
    stated["activation"] = vision.get("hidden_act", "quick_gelu")
    for tower, part in towers.items():
        activation = part.get("hidden_act", "quick_gelu")
        if activation not in ACTIVATIONS or activation != stated["activation"]:
            raise HimoError(
                f"{path}: expected {tower}_config.hidden_act to be quick_gelu or gelu, the same "
                f"for both towers, got {quoted(activation)}"
            )
    end, last = text.get("eos_token_id", 49407), text.get("vocab_size", 49408)
    # Old files say 2, which Hugging Face reads as the highest id.
    if type(last) is not int or end not in (last - 1, 2):
        raise HimoError(
            f"{path}: expected text_config.eos_token_id to be the highest token, one below "
            f"{quoted(last)}, got {quoted(end)}"
        )
    return stated


def of_image_processor(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that Hugging Face's `preprocessor_config.json` states.

    Raises:
        HimoError: it is no processor of a CLIP, or prepares images as himo does not.
    """
    if "image_processor" in config or config.keys() <= _HF_PROCESSOR:
        # A processor_config.json: of a newer version, or of an older one without image_processor.
        nested = config.get("image_processor")
        return of_image_processor(nested, path) if isinstance(nested, dict) and nested else {}
    stated = _stated(config, "", HF_PREPROCESSOR, path)
    resample = config.get("resample", 3)
    if type(resample) is not int or resample not in _PILLOW_FILTERS:
        raise HimoError(
            f"{path}: expected resample to be 2 (bilinear) or 3 (bicubic), got {quoted(resample)}"
        )
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    shortest, both = _side(size, "shortest_edge"), _side(size, "height", "width")
    squash = shortest is None
    side = both if squash else shortest
    cropped = config.get("do_center_crop", True)
    if side is None or (cropped and _side(crop, "height", "width") != side):
        raise HimoError(
            f"{path}: expected size and crop_size to be one side, got {quoted(size)} and "
            f"{quoted(crop)}"
        )
    if not cropped and not squash:
        raise HimoError(f"{path}: expected do_center_crop to be True, got {quoted(cropped)}")
    return {
        **_CLIP_IMAGES,
        "image_resolution": side,
        "interpolation": _PILLOW_FILTERS[resample],
        "resize_mode": "squash" if squash else "shortest",
        **stated,
    }


def require_clip_tokenizer(config: Mapping[str, Any], path: str) -> None:
    """Raises HimoError unless Hugging Face's `tokenizer_config.json` is of CLIP's tokenizer."""
    kind = config.get("tokenizer_class", _HF_TOKENIZERS[0])
    if kind not in _HF_TOKENIZERS:
        raise HimoError(
            f"{path}: expected tokenizer_class to be {' or '.join(_HF_TOKENIZERS)}, got "
            f"{quoted(kind)}"
        )
    if config.get("do_lower_case", True) is not True:
        raise HimoError(f"{path}: expected do_lower_case to be True: himo lowers every text")


def merged(first: Stated, second: Stated, path: str, other: str) -> Stated:
    """Both; HimoError where they state different values of a field."""
    for field in second.keys() & first.keys():
        if second[field] != first[field]:
            raise HimoError(
                f"{path}: {field} is {quoted(second[field])}, but {quoted(first[field])} in {other}"
            )
    return first | second


def hf_config(config: CLIPConfig) -> dict[str, Any]:
    """Hugging Face's `config.json` of a model."""
    towers = {}
    for tower, fields in (("text", HF_TEXT), ("vision", HF_VISION)):
        named = _named(config, fields)
        towers[tower] = {
            "model_type": f"clip_{tower}_model",
            **named,
            "intermediate_size": 4 * named["hidden_size"],
            "hidden_act": config.activation,
            "layer_norm_eps": 1e-5,
            "attention_dropout": 0.0,
        }
    # CLIP's vocabulary ends with the start and the end of a text; 0 follows the end.
    last = config.vocab_size - 1
    tokens = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": 0}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,  # ln(1 / 0.07), CLIP's
        "text_config": towers["text"] | tokens,
        "vision_config": towers["vision"] | {"num_channels": 3},
    }


def hf_preprocessor_config(config: CLIPConfig) -> dict[str, Any]:
    """Hugging Face's `preprocessor_config.json` of a model."""
    side = config.image_resolution
    both = {"height": side, "width": side}
    squash = config.resize_mode == "squash"
    filters = {name: number for number, name in _PILLOW_FILTERS.items()}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": both if squash else {"shortest_edge": side},
        "resample": filters[config.interpolation],
        "do_center_crop": not squash,
        "crop_size": both,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def hf_tokenizer_config(config: CLIPConfig) -> dict[str, Any]:
    """Hugging Face's `tokenizer_config.json` of a model with CLIP's vocabulary."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    return {
        "tokenizer_class": _HF_TOKENIZERS[0],
        "processor_class": "CLIPProcessor",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,  # like CLIP's own; tokens after the first end have no effect
        "do_lower_case": True,
        "model_max_length": config.context_length,
    }


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """The `open_clip_config.json` of a model, as open_clip reads it from a `local-dir:`."""
    preprocess = _named(config, OPEN_CLIP_PREPROCESS)
    del preprocess["size"]  # the vision_cfg has it
    head_width = config.vision_width // config.vision_heads
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {**_named(config, OPEN_CLIP_VISION), "head_width": head_width},
            "text_cfg": _named(config, OPEN_CLIP_TEXT),
        },
        "preprocess_cfg": preprocess,
    }


def _named(config: CLIPConfig, fields: Fields) -> dict[str, Any]:
    """The values of CLIPConfig under the names that another project has for them."""
    values = config.to_dict()
    return {name: values[field] for name, field in fields.items() if isinstance(field, str)}


def _stated(part: Mapping[str, Any], name: str, fields: Fields, path: str) -> Stated:
    """The fields of CLIPConfig in a part of a configuration; HimoError as `of_open_clip`."""
    stated: Stated = {}
    for key, value in part.items():
        place = f"{name}.{shortened(key)}" if name else shortened(key)
        known = fields.get(key)
        if value is None or known == ANY:
            continue
        if known is None:
            raise HimoError(
                f"{path}: {place} is {quoted(value)}, which himo does not know: it may change "
                "every feature"
            )
        if isinstance(known, str):
            stated[known] = _one_side(value) if known == "image_resolution" else value
        elif value not in known:
            expected = " or ".join(str(choice) if choice != "" else "absent" for choice in known)
            raise HimoError(f"{path}: expected {place} to be {expected}, got {quoted(value)}")
    for field in ("image_mean", "image_std"):
        if type(stated.get(field)) in (int, float):  # one number for R, G and B
            stated[field] = [stated[field]] * 3
    return stated


def _side(size: Any, *names: str) -> Any:
    """The side of a size, which is a number or has one number under these names; else None."""
    if not isinstance(size, dict):
        return size
    same = size.keys() == {*names} and all(side == size[names[0]] for side in size.values())
    return size[names[0]] if same else None


def _one_side(value: Any) -> Any:
    """The side of a square that is given as [side, side]; any other value unchanged."""
    square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if square else value
