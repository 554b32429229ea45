"""The configuration of a CLIP: sizes, heads, activation, and the preprocessing of images."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from himo.errors import HimoError, quoted, shortened

# Rows of the text positions that are frozen at CLIP's values (Long-CLIP, arXiv 2403.15378, 3.1).
KEPT_POSITIONS = 20
CONTEXT_LENGTH = 248  # these 20 rows, and the other 57 of CLIP's 77 stretched to four each
# Far above any model, and low enough to bound the time and memory of a hostile configuration.
_MAX_SIZE, _MAX_LAYERS = 1 << 20, 256
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, R, G, B in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = ("quick_gelu", "gelu")
RESIZE_MODES = ("shortest", "squash")
_CHOICES = {
    "activation": ACTIVATIONS,
    "interpolation": ("bicubic", "bilinear"),
    "resize_mode": RESIZE_MODES,
}


def _three(name: str, values: Any, lowest: float) -> tuple[float, ...]:
    """The values as floats; HimoError unless they are three numbers above lowest."""
    several = isinstance(values, tuple | list) and len(values) == 3
    if several and all(type(x) in (int, float) and lowest < x < math.inf for x in values):
        return tuple(float(x) for x in values)
    got = ", ".join(quoted(x) for x in values) if several else quoted(values)
    least = "" if lowest == -math.inf else f" above {lowest:g}"
    raise _expected(f"{name} to be 3 numbers{least}", got)


def _expected(what: str, got: object) -> HimoError:
    return HimoError(f"model configuration: expected {what}, got {got}")


@dataclass(frozen=True)
class CLIPConfig:
    """Everything but the weights that decides the features of a model.

    Sizes; heads, where 0 means one for each 64 channels; the activation of both towers; and the
    preprocessing of images that the weights were trained with (`himo.transforms.Preprocess`).

    Raises:
        HimoError: a size is no positive integer, patches do not tile the image, heads do not
            divide the width, or another field has a value that himo does not compute.
    """

    embed_dim: int  # channels of the joint embedding
    image_resolution: int  # pixels, height and width
    vision_layers: int
    vision_width: int  # channels
    vision_patch_size: int  # pixels
    context_length: int  # tokens
    vocab_size: int  # tokens; the highest one ends a text
    text_width: int  # channels
    text_layers: int
    vision_heads: int = 0
    text_heads: int = 0
    activation: str = "quick_gelu"  # x * sigmoid(1.702 x); or "gelu", x * Phi(x)
    image_mean: tuple[float, ...] = MEAN  # R, G, B in [0, 1]
    image_std: tuple[float, ...] = STD
    interpolation: str = "bicubic"  # or "bilinear"
    resize_mode: str = "shortest"  # side, then a centre crop; or "squash", both sides

    def __post_init__(self) -> None:
        self._check_sizes()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _expected(f"{name} to be {' or '.join(choices)}", quoted(getattr(self, name)))
        for name, lowest in (("image_mean", -math.inf), ("image_std", 0.0)):
            object.__setattr__(self, name, _three(name, getattr(self, name), lowest))

    def _check_sizes(self) -> None:
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if type(heads) is int and heads == 0 and isinstance(width, int):
                object.__setattr__(self, f"{tower}_heads", max(1, width // 64))
        for field in fields(self):
            value = getattr(self, field.name)
            most = _MAX_LAYERS if field.name.endswith("layers") else _MAX_SIZE
            if field.type is int and (type(value) is not int or not 1 <= value <= most):
                raise _expected(f"{field.name} to be an integer from 1 to {most}", quoted(value))
        if self.image_resolution % self.vision_patch_size:
            raise _expected(
                f"image_resolution to be a multiple of vision_patch_size {self.vision_patch_size}",
                self.image_resolution,
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise _expected(f"{tower}_heads to divide {tower}_width {width}", heads)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as a checkpoint stores them."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ("image_mean", "image_std")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CLIPConfig":
        """The configuration of `to_dict`; HimoError names a field that is missing or unknown.

        Files of older versions, which knew only CLIP's, lack the activation and preprocessing.
        """
        names = {field.name for field in fields(cls)}
        optional = {*UNSHAPED} - {"vision_heads", "text_heads"}
        lacks, unknown = names - optional - set(values), set(values) - names
        for kind, wrong in (("lacks", lacks), ("has unknown", unknown)):
            if wrong:
                few = ", ".join(shortened(name) for name in sorted(wrong)[:3])
                raise HimoError(f"model configuration: {kind} {few}")
        return cls(**values)


# The fields that no tensor's shape tells: those with a default.
UNSHAPED = tuple(field.name for field in fields(CLIPConfig) if field.default is not MISSING)


def _clip(
    embed_dim: int, resolution: int, patch: int, vision: tuple[int, int], text_layers: int = 12
) -> CLIPConfig:
    layers, width = vision
    return CLIPConfig(
        embed_dim=embed_dim,
        image_resolution=resolution,
        vision_layers=layers,
        vision_width=width,
        vision_patch_size=patch,
        context_length=CONTEXT_LENGTH,
        vocab_size=49408,
        text_width=embed_dim,  # as in every CLIP of OpenAI with a ViT
        text_layers=text_layers,
    )


CONFIGS: Mapping[str, CLIPConfig] = {
    "ViT-B-32": _clip(512, 224, 32, (12, 768)),
    "ViT-B-16": _clip(512, 224, 16, (12, 768)),
    "ViT-L-14": _clip(768, 224, 14, (24, 1024)),
    "ViT-L-14-336": _clip(768, 336, 14, (24, 1024)),
    "tiny": _clip(128, 64, 16, (3, 128), text_layers=2),  # trains on two CPU cores in minutes
}


def named_config(name: str) -> CLIPConfig:
    """The configuration that --model names; HimoError for an unknown one."""
    if name not in CONFIGS:
        raise HimoError(f"--model: expected one of {', '.join(CONFIGS)}, got {name}")
    return CONFIGS[name]
