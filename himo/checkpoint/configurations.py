"""The configurations beside weights, of Hugging Face and open_clip: read, and written.

What a configuration states is used, or the same as what himo computes, or refused by its name: a
field that is not known here may change every feature.
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
from himo.clip_config import MEAN, STD, CLIPConfig
from himo.errors import HimoError, quoted, shortened

Stated = dict[str, Any]  # fields of CLIPConfig

_HF_PROCESSOR = {"processor_class", "image_processor", "tokenizer"}
_HF_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_PILLOW_FILTERS = {2: "bilinear", 3: "bicubic"}  # as Hugging Face numbers them


def of_open_clip(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that open_clip's `open_clip_config.json` states.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    model = config.get("model_cfg")
    vision, text = (
        model.get(f"{tower}_cfg") if isinstance(model, dict) else None
        for tower in ("vision", "text")
    )
    if not (isinstance(model, dict) and isinstance(vision, dict) and isinstance(text, dict)):
        raise HimoError(f"{path}: not the configuration of a CLIP of open_clip")
    preprocess = config.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise HimoError(
            f"{path}: expected preprocess_cfg to be an object, got {quoted(preprocess)}"
        )
    stated = (
        _stated(model, "model_cfg", OPEN_CLIP_MODEL, path)
        | _stated(vision, "vision_cfg", OPEN_CLIP_VISION, path)
        | {"text_heads": 8}  # open_clip's default
        | _stated(text, "text_cfg", OPEN_CLIP_TEXT, path)
    )
    of_images = _stated(preprocess, "preprocess_cfg", OPEN_CLIP_PREPROCESS, path)
    _require_same(of_images, stated, f"{path}: preprocess_cfg", "vision_cfg")
    if of_images.get("interpolation") == "random":  # of training; images are encoded as with
        of_images["interpolation"] = "bicubic"
    width, of_a_head = vision.get("width", 768), vision.get("head_width", 64)
    if not all(type(value) is int and value > 0 for value in (width, of_a_head)):
        raise HimoError(
            f"{path}: expected vision_cfg.width and head_width to be positive integers, "
            f"got {quoted(width)} and {quoted(of_a_head)}"
        )
    heads = {"vision_heads": width // of_a_head}
    # open_clip's default is GELU.
    activation = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    images = {"image_mean": MEAN, "image_std": STD, "interpolation": "bicubic"}
    return stated | heads | activation | images | {"resize_mode": "shortest"} | of_images


def of_hugging_face(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that Hugging Face's `config.json` of a CLIPModel states.

    Raises:
        HimoError: the model computes something else than a HiMoCLIP with the same weights.
    """
    towers = {}
    for tower in ("vision", "text"):
        part = config.get(f"{tower}_config")
        if not isinstance(part, dict):
            raise HimoError(f"{path}: not the configuration of a CLIPModel: no {tower}_config")
        # What files of old versions had, and what it said where both do.
        earlier = config.get(f"{tower}_config_dict")
        for key, value in earlier.items() if isinstance(earlier, dict) else ():
            if part.get(key) != value:
                raise HimoError(f"{path}: two values of {shortened(key)} for the {tower} tower")
        towers[tower] = part
    vision, text = towers["vision"], towers["text"]
    stated = _stated(config, "", HF_MODEL, path)
    for tower, fields, heads in (("vision", HF_VISION, 12), ("text", HF_TEXT, 8)):
        part = _stated(towers[tower], f"{tower}_config", fields, path)
        part.pop("embed_dim", None)  # the projection of a tower alone; the model has its own
        stated |= {f"{tower}_heads": heads} | part
    activations = [part.get("hidden_act", "quick_gelu") for part in (vision, text)]
    for tower, activation in zip(("vision", "text"), activations, strict=True):
        if activation not in ("quick_gelu", "gelu") or activation != activations[0]:
            raise HimoError(
                f"{path}: expected {tower}_config.hidden_act to be quick_gelu or gelu, the same "
                f"for both towers, got {quoted(activation)}"
            )
    end, last = text.get("eos_token_id", 49407), text.get("vocab_size", 49408)
    # 2: what old files say and Hugging Face reads as the highest id
    if type(last) is not int or end not in (last - 1, 2):
        raise HimoError(
            f"{path}: expected text_config.eos_token_id to be the highest token, one below "
            f"{quoted(last)}, got {quoted(end)}"
        )
    return stated | {"activation": activations[0]}


def of_image_processor(config: Mapping[str, Any], path: str) -> Stated:
    """The fields of CLIPConfig that Hugging Face's `preprocessor_config.json` states.

    Raises:
        HimoError: it is no processor of a CLIP, or prepares images as himo does not.
    """
    if "image_processor" in config or config.keys() <= _HF_PROCESSOR:
        # The processor_config.json of newer versions, of older ones without it.
        nested = config.get("image_processor")
        return of_image_processor(nested, path) if isinstance(nested, dict) and nested else {}
    stated = _stated(config, "", HF_PREPROCESSOR, path)
    images: Stated = {"image_mean": MEAN, "image_std": STD}
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
    images |= {"image_resolution": side, "interpolation": _PILLOW_FILTERS[resample]}
    return images | {"resize_mode": "squash" if squash else "shortest"} | stated


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
    """Both; HimoError where they state one field differently."""
    _require_same(second, first, path, other)
    return first | second


def hf_config(config: CLIPConfig) -> dict[str, Any]:
    """Hugging Face's `config.json` of a model."""
    common = {
        "hidden_act": config.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": config.embed_dim,
    }
    text = {
        **common,
        "model_type": "clip_text_model",
        "vocab_size": config.vocab_size,
        "hidden_size": config.text_width,
        "intermediate_size": 4 * config.text_width,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "max_position_embeddings": config.context_length,
        # CLIP's vocabulary ends with the start and the end of a text; 0 follows the end.
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": 0,
    }
    vision = {
        **common,
        "model_type": "clip_vision_model",
        "hidden_size": config.vision_width,
        "intermediate_size": 4 * config.vision_width,
        "num_hidden_layers": config.vision_layers,
        "num_attention_heads": config.vision_heads,
        "num_channels": 3,
        "image_size": config.image_resolution,
        "patch_size": config.vision_patch_size,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": 2.6592,  # ln(1 / 0.07), CLIP's
        "text_config": text,
        "vision_config": vision,
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
        "pad_token": end,  # as CLIP's own; what follows the first end has no effect
        "do_lower_case": True,
        "model_max_length": config.context_length,
    }


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """The `open_clip_config.json` of a model, as open_clip reads it from a `local-dir:`."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_resolution,
                "layers": config.vision_layers,
                "width": config.vision_width,
                "head_width": config.vision_width // config.vision_heads,
                "patch_size": config.vision_patch_size,
            },
            "text_cfg": {
                "context_length": config.context_length,
                "vocab_size": config.vocab_size,
                "width": config.text_width,
                "heads": config.text_heads,
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize_mode,
        },
    }


def _stated(part: Mapping[str, Any], name: str, fields: Fields, path: str) -> Stated:
    """What a part of a configuration states; HimoError for what himo does not compute."""
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


def _require_same(stated: Stated, before: Stated, path: str, other: str) -> None:
    for field in stated.keys() & before.keys():
        if _plain(stated[field]) != _plain(before[field]):
            raise HimoError(
                f"{path}: {field} is {quoted(stated[field])}, but "
                f"{quoted(before[field])} in {other}"
            )


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value


def _side(size: Any, *names: str) -> Any:
    """The side in a size of Hugging Face, a number or these names with one; None in another."""
    if not isinstance(size, dict):
        return size
    same = size.keys() == {*names} and all(side == size[names[0]] for side in size.values())
    return size[names[0]] if same else None


def _one_side(value: Any) -> Any:
    """The side of a square that is given as its two sides."""
    square = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if square else value
