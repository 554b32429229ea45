"""Decodes the image at a path or in bytes to 8 bits a channel."""

import errno
import io
import operator
import os
import re
import struct
import sys
from collections.abc import Callable
from typing import BinaryIO

from PIL import Image, ImageFile, JpegImagePlugin

from himo.errors import HimoError
from himo.files import open_regular
from himo.images import jpeg, png, small_formats, tiff
from himo.images.grey import check_channels, eight_bits
from himo.images.limits import MAX_PIXELS, ImageError, Reader, Reason
from himo_kernels.process_state import Borrowed

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

# The formats read, by the start of a file. Pillow's plug-ins are called directly: the limit on
# pixels of Image.open holds for the whole process, and warns before it refuses.
_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[Reader], Image.Image]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), jpeg.read),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), png.read),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), small_formats.read_webp),
    (re.compile(rb"GIF8[79]a"), small_formats.read_gif),
    (re.compile(rb"BM"), small_formats.read_bmp),
    (re.compile(rb"II\*\0|MM\0\*"), tiff.read),
    # Not P1 to P3: text, which Pillow decodes in Python, over a second for each megapixel.
    (re.compile(rb"P[456]\s"), small_formats.read_ppm),
)
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF or binary PPM"


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an image file, decoded, in the mode of the file or `L` for deeper greys.

    Reads JPEG, PNG, WebP, GIF, BMP, TIFF and binary PPM. The cost is checked before memory is
    allocated; see `himo.images.limits`. Greys of more than 8 bits become 8; see `himo.images.grey`.
    Metadata is skipped, so the EXIF orientation is not applied, as in CLIP's own preprocessing.
    Pillow itself applies the orientation of a TIFF file. A truncated file is refused even if Pillow
    is set to load such files.

    Args:
        source: a path, which has to be a regular file, or the bytes of a file.
        max_pixels: the most pixels (width times height) that are decoded; no side may exceed
            65,535.

    Raises:
        ImageError: for every file that cannot be read; no other exception comes from its content.
    """
    return decode(source, max_pixels)[0]


# One setting of Pillow for the process: it is set for the decoding, and restored for other code.
_loads_truncated = Borrowed(
    False,
    lambda: ImageFile.LOAD_TRUNCATED_IMAGES,
    lambda value: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", value),
    serves=operator.not_,
)


@_loads_truncated.lent()
def decode(
    source: Source, max_pixels: int = MAX_PIXELS, side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """As `open_image`, with the width and height in the header.

    With `side`, a JPEG is shrunk by 2, 4 or 8 as long as its short side stays at or above it.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise HimoError(f"open_image: expected a path or bytes, got {type(source).__name__}")
    try:
        if not isinstance(source, str | os.PathLike):
            return _decode(io.BytesIO(source), max_pixels, side)
        with open_regular(source) as file:
            return _decode(file, max_pixels, side)
    except ImageError as error:
        raise ImageError(f"{source_name(source)}: {error}", error.reason) from error
    except HimoError as error:  # of open_regular, which names the path
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        missing = isinstance(cause, ValueError) or number not in (None, errno.ENXIO)
        raise ImageError(str(error), "missing" if missing else "not_a_file") from error
    except Exception as error:  # the plug-ins raise anything, KeyError included
        raise ImageError(
            f"{source_name(source)}: {error or type(error).__name__}", _reason(error)
        ) from error


def source_name(source: Source) -> str:
    """The path, or the number of bytes."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"image of {len(source):,} bytes"


def _decode(
    file: BinaryIO, max_pixels: int, side: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    start = file.read(16)
    if not start:
        raise ImageError("empty file", "truncated")
    read = next((read for magic, read in _FORMATS if magic.match(start)), None)
    if read is None:
        raise ImageError(f"not {_FORMAT_NAMES}: starts with {start!r}", "unknown_format")
    image = read(Reader(file, max_pixels))
    size = image.size
    if side is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (side, side))
    deep = ";16" in repr(getattr(image, "tile", ""))  # Pillow's name of the bytes it will decode
    image.load()
    if deep:
        check_channels(image, lambda: _low_bytes(read(Reader(file, max_pixels, decodings=2))))
    return eight_bits(image), size


def _low_bytes(image: Image.Image) -> Image.Image:
    """Decodes the low byte of each 16-bit channel, where Pillow takes the high one."""
    assert isinstance(image, ImageFile.ImageFile)  # of a plug-in that is called directly
    is_grey = False
    for number, tile in enumerate(image.tile):
        name, *others = [tile.args] if isinstance(tile.args, str) else tile.args or ("",)
        if name == "LA;16B":  # Pillow has no other order of it: all four bytes as channels
            is_grey, name = True, "RGBA"
        else:
            order = sys.byteorder[0].upper() if name[-1:] == "N" else name[-1:]
            # RGBa would be divided by the low byte of alpha, which may be 0.
            name = name[:-1].replace("a", "A") + ("L" if order == "B" else "B")
        args = name if isinstance(tile.args, str) else (name, *others)
        image.tile[number] = tile._replace(args=args)
    image.load()
    return image.getchannel("G") if is_grey else image


def _reason(error: Exception) -> Reason:
    """The kind of an exception from a plug-in of Pillow, as far as it can be told."""
    text = str(error).lower()
    large = (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)
    if isinstance(error, large) or "too large" in text or "too much memory" in text:
        return "too_large"
    short = (EOFError, IndexError, struct.error)
    if isinstance(error, short) or isinstance(error.__cause__, short) or "truncated" in text:
        return "truncated"
    if isinstance(error, OSError) and error.errno is not None:
        return "missing"  # a read that failed
    return "corrupt"
