"""Conversion of greys of more than 8 bits to 8 bits.

Pillow and torchvision clip such values at 255, which makes most of these pictures white.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from himo.images.limits import ImageError

_DEEP = ("I", "F")  # and all that begin with "I;"
_CHANNELS = ("LA", "RGB", "RGBA")  # of 8 bits, decoded from 16
# The largest values of 8 bits and of the depths that cameras, scanners and detectors give.
_WHITES = (255, 1023, 4095, 16_383, 65_535)
_LEAST_OF_255 = 16  # a float picture without a pixel above is not one from 0 to 255
_LEAST_OF_1 = 1 / 16  # nor one from 0 to 1: at least 16 levels are left of either
_LEAST_HIGH_BYTE = 16  # a picture of 16-bit channels without a pixel above is one of 12 bits


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel: the image itself, or mode `L` for one with deeper greys.

    Black is 0. White is the largest value of 8, 10, 12, 14 or 16 bits, for the fewest bits that no
    pixel exceeds. For floats white may also be 1. It is the greatest value of the picture if this
    is between 1 and 16, because a resampling may overshoot 1, or below 1/16, because in some units
    of measure all values are small. If a pixel is negative or above 65,535, black
    and white are the least and the greatest value. Values are rounded to the nearest of 256 levels,
    half to even. NaN is black; infinities are black and white.

    Raises:
        ImageError: no value is finite; or values that differ would all become one grey; or all
            but the least and the greatest, such as a mark for no data, one grey or two.
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
        of_no_range = 1 < greatest < _LEAST_OF_255 or least < greatest < _LEAST_OF_1
        if image.mode == "F" and of_no_range:
            white = greatest
    else:
        black, white = least, greatest
    levels = _levels(values, black, white)
    if least < greatest and levels.min() == levels.max():
        raise ImageError(
            f"values from {least:.7g} to {greatest:.7g} would become one grey of 256 between "
            f"{black:.7g} and {white:.7g}",
            "unknown_format",
        )
    if _merges_all_between(values, levels, least, greatest):
        raise ImageError(
            f"all values but {least:.7g} and {greatest:.7g} would become one or two greys of 256 "
            f"between {black:.7g} and {white:.7g}",
            "unknown_format",
        )
    return Image.fromarray(levels)


def check_channels(image: Image.Image, low_bytes: Callable[[], Image.Image]) -> None:
    """Raises ImageError for decoded channels of 16 bits whose values fill 12 bits or fewer.

    The decoder keeps the high byte of each value, which leaves at most 16 levels, nearly black. An
    image without a value above 0 is not refused: it loses nothing.

    Args:
        image: as decoded.
        low_bytes: decodes the image again, to the low byte of each value.
    """
    if image.mode not in _CHANNELS or _brightest(image) >= _LEAST_HIGH_BYTE:
        return
    if _brightest(image) or _brightest(low_bytes()):
        raise ImageError(
            "channels of 16 bits without a value above 4,095 would be nearly black",
            "unknown_format",
        )


def _brightest(image: Image.Image) -> int:
    """The greatest value of the channels other than alpha."""
    bands = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return max(int(np.asarray(band).max(initial=0)) for band in bands)


def _merges_all_between(
    values: np.ndarray, levels: np.ndarray, least: float, greatest: float
) -> bool:
    """Whether the values between the least and the greatest have two adjacent levels at most.

    False if none of them differ within a level: then nothing is lost.
    """
    ranges: dict[int, tuple[float, float]] = {}  # the values of each level
    for row, row_levels in zip(values, levels, strict=True):
        between = (row > least) & (row < greatest)
        for level in np.unique(row_levels[between]).tolist():
            same = row[between & (row_levels == level)]
            low, high = ranges.get(level, (np.inf, -np.inf))
            ranges[level] = min(low, float(same.min())), max(high, float(same.max()))
            if max(ranges) - min(ranges) > 1:
                return False
    return any(low < high for low, high in ranges.values())


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
