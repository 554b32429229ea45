"""Conversion of greys of more than 8 bits to 8 bits.

Pillow and torchvision clip such values at 255, which makes most of these pictures white.
"""

import numpy as np
from PIL import Image

from himo.images.limits import ImageError

_DEEP = ("I", "F")  # and all that begin with "I;"
# The largest values of 8 bits and of the depths that cameras, scanners and detectors give.
_WHITES = (255, 1023, 4095, 16_383, 65_535)


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel: the image itself, or mode `L` for one with deeper greys.

    Black is 0; white is the largest value of 8, 10, 12, 14 or 16 bits, the first of these that no
    pixel exceeds, and for floats also 1. If a pixel is negative or above 65,535, black and white
    are the least and the greatest value. Values are rounded to the nearest of 256 levels, half to
    even. NaN is black; infinities are black and white.

    Raises:
        ImageError: no value is finite, or values that differ would all become one grey.
    """
    if image.mode not in _DEEP and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    if values.size == 0:
        return image
    least, greatest = _range(values)
    black = 0.0
    if least >= 0 and greatest <= _WHITES[-1]:
        whites = (1, *_WHITES) if image.mode == "F" else _WHITES
        white = float(next(white for white in whites if greatest <= white))
    else:
        black, white = least, greatest
    levels = _levels(values, black, white)
    if least < greatest and levels.min() == levels.max():
        raise ImageError(
            f"values from {least:.7g} to {greatest:.7g} would become one grey of 256 between "
            f"{black:.7g} and {white:.7g}",
            "unknown_format",
        )
    return Image.fromarray(levels)


def _range(values: np.ndarray) -> tuple[float, float]:
    """The least and the greatest finite value."""
    if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
        values = values[finite]
        if not values.size:
            raise ImageError("no pixel is a finite number")
    return float(values.min()), float(values.max())


def _levels(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8 of the same shape: 0 at black and below, 255 at white and above."""
    levels = np.empty(values.shape, dtype=np.uint8)
    scale = 255 / (white - black) if white > black else 0.0
    for row, result in zip(values, levels, strict=True):  # a row at a time: 8 bytes a pixel
        within = np.nan_to_num(row.astype(np.float64).clip(black, white), nan=black)
        np.rint((within - black) * scale, out=result, casting="unsafe")
    return levels
