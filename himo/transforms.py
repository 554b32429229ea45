"""From an image file to the tensor a model takes, with Pillow and torch alone.

`open_image` reads untrusted files: whatever they hold, the result is a decoded image or an
`ImageError`. `Preprocess` is CLIP's resize, centre crop and normalisation.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from himo.clip_config import MEAN, RESIZE_MODES, STD, CLIPConfig
from himo.errors import HimoError, quoted
from himo.images import (
    MAX_PIXELS,
    ImageError,
    Reason,
    Source,
    decode,
    eight_bits,
    open_image,
    source_name,
)

__all__ = ["MEAN", "STD", "ImageError", "Preprocess", "Reason", "normalize", "open_image"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# In fast mode a JPEG may be shrunk while it is decoded, to no less than this many resolutions.
_DRAFT_SIDES = 2


@dataclass(frozen=True)
class Preprocess:
    """CLIP's preprocessing: short side to `resolution`, centre crop, RGB, normalised.

    Or a variant that a checkpoint states: `Preprocess.of` takes it from there.

    `exact` gives, bit for bit, torchvision's Resize(bicubic), CenterCrop, conversion to RGB,
    ToTensor and Normalize. As there, the conversion comes after the resize, so palette and 1-bit
    images are resized by the nearest pixel, and alpha is dropped. Greys of more than 8 bits, which
    become white there, are scaled: see `himo.images.grey`.

    `fast` differs by a few 1/255: `read` lets the JPEG decoder shrink a large image to no less than
    twice the resolution, and torch resizes RGB and grey images, also those already decoded. Other
    modes are resized as in `exact`. The crop is always the crop of `exact`, because it follows from
    the size in the header.

    Args:
        resolution: R, pixels of a side of the result.
        mode: "exact" or "fast".
        mean, std: of R, G and B in [0, 1], subtracted and divided by.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" as above, or "squash": both sides to R, nothing cropped.

    Raises:
        HimoError: an unknown mode, or a resolution below 1.
    """

    resolution: int
    mode: Literal["exact", "fast"] = "exact"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    @classmethod
    def of(cls, config: CLIPConfig, mode: Literal["exact", "fast"] = "exact") -> "Preprocess":
        """The preprocessing that a model's weights were trained with."""
        return cls(
            config.image_resolution,
            mode,
            config.image_mean,
            config.image_std,
            config.interpolation,
            config.resize_mode,
        )

    def __post_init__(self) -> None:
        if self.mode not in ("exact", "fast"):
            raise HimoError(f"Preprocess: expected mode to be exact or fast, got {self.mode!r:.40}")
        for name, choices in (("interpolation", _FILTERS), ("resize_mode", RESIZE_MODES)):
            if getattr(self, name) not in choices:
                raise HimoError(
                    f"Preprocess: expected {name} to be {' or '.join(choices)}, got "
                    f"{quoted(getattr(self, name))}"
                )
        if not isinstance(self.resolution, int) or self.resolution < 1:
            raise HimoError(
                "Preprocess: expected resolution to be an integer of at least 1, got "
                f"{self.resolution!r:.40}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """An image as float32 [3, R, R], normalised; ImageError as `uint8`."""
        return self.normalize(self.uint8(image))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [..., 3, R, R] as float32, normalised, as the function `normalize`."""
        return normalize(images, self.mean, self.std)

    def uint8(self, image: Image.Image) -> Tensor:
        """An image resized and cropped, as uint8 [3, R, R], for `normalize`.

        Raises:
            ImageError: a mode that has no RGB, or a shape so narrow that the resized image would
                exceed 50 million pixels.
        """
        return self._uint8(image, image.size)

    def read(self, source: Source, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """`uint8(open_image(source))`, and in fast mode decodes no more of a JPEG than needed.

        Raises:
            ImageError: as `open_image` and `uint8`, naming the file.
        """
        side = _DRAFT_SIDES * self.resolution if self.mode == "fast" else None
        image, size = decode(source, max_pixels, side)
        try:
            return self._uint8(image, size)
        except ImageError as error:
            raise ImageError(f"{source_name(source)}: {error}", error.reason) from error

    def _uint8(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """uint8 [3, R, R] of an image of full size `size`, which may have been shrunk since."""
        if min(size) < 1:
            raise ImageError(f"{size[0]} x {size[1]} pixels: nothing to resize")
        if self.resize_mode == "squash":
            width = height = self.resolution
        else:
            short = min(size)
            width, height = (int(self.resolution * side / short) for side in size)
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{size[0]} x {size[1]} pixels would be resized to {width} x {height}, more than "
                f"{MAX_PIXELS:,} pixels",
                "too_large",
            )
        image = eight_bits(image)
        # Banker's rounding, as torchvision's CenterCrop.
        left, top = round((width - self.resolution) / 2), round((height - self.resolution) / 2)
        right, bottom = left + self.resolution, top + self.resolution
        if self.mode == "fast" and image.mode in ("RGB", "L"):
            pixels = torch.from_numpy(np.array(image))
            pixels = pixels.view(1, image.height, image.width, -1).permute(0, 3, 1, 2)
            if (image.width, image.height) != (width, height):
                pixels = torch.nn.functional.interpolate(
                    pixels, (height, width), mode=self.interpolation, antialias=True
                )
            return pixels[0, :, top:bottom, left:right].expand(3, -1, -1).contiguous()
        try:
            if image.size != (width, height):
                image = image.resize((width, height), _FILTERS[self.interpolation])
            image = image.crop((left, top, right, bottom)).convert("RGB")
        except (ValueError, OSError) as error:
            raise ImageError(
                f"pixels of mode {image.mode} cannot become RGB ({error})", "unknown_format"
            ) from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(
    images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """uint8 [..., 3, R, R] as float32, minus a mean, over a standard deviation, on its device.

    Both are of R, G and B in [0, 1], by default CLIP's. Equal, bit for bit, to torchvision's
    ToTensor and Normalize.
    """
    if images.dtype != torch.uint8 or images.dim() < 3 or images.shape[-3] != 3:
        raise HimoError(
            f"normalize: expected uint8 [..., 3, R, R], got {images.dtype} {list(images.shape)}"
        )
    # torch.tensor(..., device=) would wait for the device. White is a tensor, because a GPU divides
    # by a number as it multiplies by its reciprocal, which rounds differently.
    constants = torch.tensor(((255.0,) * 3, mean, std)).view(3, 3, 1, 1)
    white, centre, spread = constants.to(images.device, non_blocking=True)
    return images.to(torch.float32).div_(white).sub_(centre).div_(spread)
