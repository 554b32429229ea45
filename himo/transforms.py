"""From an image file to the tensor a model takes, with Pillow and torch alone.

`open_image` reads files nobody has looked at: whatever they hold, the result is a decoded image or
an `ImageError`. `Preprocess` is CLIP's resize, centre crop and normalisation.
"""

import errno
import io
import os
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from himo.clip_config import MEAN, RESIZE_MODES, STD, CLIPConfig
from himo.errors import HimoError, quoted
from himo.files import open_regular

Reason = Literal["missing", "not_a_file", "too_large", "truncated", "unknown_format", "corrupt"]
Source = str | os.PathLike[str] | bytes | bytearray | memoryview

MAX_PIXELS = 50_000_000
_MAX_SIDE = 65_535  # the most of JPEG and GIF: beyond it are strips that no crop is taken from

# The formats read, by how a file starts. Pillow's plug-ins are called one by one and not through
# Image.open, whose limit on pixels belongs to the whole process and warns before it refuses.
_FORMATS: tuple[tuple[re.Pattern[bytes], type[ImageFile.ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"II\*\0|MM\0\*"), TiffImagePlugin.TiffImageFile),
    # Not P1 to P3: text, which Pillow decodes in Python, over a second for each megapixel.
    (re.compile(rb"P[456]\s"), PpmImagePlugin.PpmImageFile),
)
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_FORMAT_NAMES = "JPEG, PNG, WebP, GIF, BMP, TIFF or binary PPM"
# Each scan of a progressive JPEG passes over the whole image, and an empty one takes ten bytes of
# the file. Encoders write about ten scans; this many are read at the limit of pixels.
_MAX_SCANS = 20
# The compressed texts of a PNG, which Pillow unpacks and keeps, up to 1 MiB each.
_MAX_TEXTS = 16
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
# A JPEG may be shrunk while it is decoded, in fast mode, to no less than this many resolutions.
_DRAFT_SIDES = 2


class ImageError(HimoError):
    """An image that cannot be used, and why.

    `reason` is one of: missing (no such file, or no right to read it), not_a_file (a directory,
    FIFO or device), too_large (pixels, scans or metadata), truncated, unknown_format (none of the
    formats read, or pixels of a kind that has no RGB), corrupt.
    """

    reason: Reason

    # One positional argument makes an exception that pickles, and that a DataLoader can raise
    # again in the main process.
    def __init__(self, message: str, reason: Reason = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason


def open_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an image file, decoded, in the mode of the file.

    Reads JPEG, PNG, WebP, GIF, BMP, TIFF and binary PPM. The size is taken from the header and
    checked before memory for the pixels is allocated. The EXIF orientation is not applied, as in
    CLIP's own preprocessing; Pillow applies that of TIFF. A truncated file is refused even where
    Pillow has been told to load such files.

    Args:
        source: a path, which has to be a regular file, or the bytes of a file.
        max_pixels: the most pixels (width times height) that are decoded; no side may exceed
            65,535.

    Raises:
        ImageError: for every file that cannot be read; no other exception comes from its content.
    """
    return _decode(source, max_pixels)[0]


@dataclass(frozen=True)
class Preprocess:
    """CLIP's preprocessing: short side to `resolution`, centre crop, RGB, normalised.

    Or the like of it that a checkpoint states: `Preprocess.of` takes it from there.

    `exact` gives, bit for bit, torchvision's Resize(bicubic), CenterCrop, conversion to RGB,
    ToTensor and Normalize. As there, the conversion comes after the resize, so palette and 1-bit
    images are resized by the nearest pixel, alpha is dropped, and 16-bit grey saturates at 255.

    `fast` differs by a few 1/255: `read` lets the JPEG decoder shrink a large image to no less
    than twice the resolution, and RGB and grey images are resized by torch. Other modes, and
    images that are already decoded, take the same way as far as it applies to them. The crop is
    that of `exact`, because it follows from the size in the header.

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
        """An image resized and cropped, as uint8 [3, R, R]; `normalize` does the rest.

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
        image, size = _decode(source, max_pixels, side)
        try:
            return self._uint8(image, size)
        except ImageError as error:
            raise ImageError(f"{_name(source)}: {error}", error.reason) from error

    def _uint8(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """uint8 [3, R, R] of an image whose full size is `size`, though it may have been shrunk."""
        if min(size) < 1:
            raise ImageError(f"{size[0]} x {size[1]} pixels: nothing to resize")
        if self.resize_mode == "squash":
            width = height = self.resolution
        else:
            width, height = _resized(size, self.resolution)
        if width * height > MAX_PIXELS:
            raise ImageError(
                f"{size[0]} x {size[1]} pixels would be resized to {width} x {height}, more than "
                f"{MAX_PIXELS:,} pixels",
                "too_large",
            )
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
    """uint8 [..., 3, R, R] as float32 with a mean and a standard deviation, on its device.

    Both of R, G and B in [0, 1]; CLIP's by default. Equal, bit for bit, to ToTensor and Normalize
    of torchvision.
    """
    if images.dtype != torch.uint8 or images.dim() < 3 or images.shape[-3] != 3:
        raise HimoError(
            f"normalize: expected uint8 [..., 3, R, R], got {images.dtype} {list(images.shape)}"
        )
    centre = torch.tensor(mean, device=images.device).view(3, 1, 1)
    spread = torch.tensor(std, device=images.device).view(3, 1, 1)
    return images.to(torch.float32).div_(255).sub_(centre).div_(spread)


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The width and height of an image whose short side becomes `resolution`."""
    width, height = size
    if width <= height:
        return resolution, int(resolution * height / width)
    return int(resolution * width / height), resolution


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return f"image of {len(source):,} bytes"


def _decode(
    source: Source, max_pixels: int, side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """The decoded image, and its width and height in the header.

    With `side`, a JPEG is shrunk by 2, 4 or 8 as long as its short side stays at or above it.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise HimoError(f"open_image: expected a path or bytes, got {type(source).__name__}")
    # Threads that decode at once may leave it False, which is what himo wants of it.
    loads_truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        if not isinstance(source, str | os.PathLike):
            return _decode_file(io.BytesIO(source), max_pixels, side)
        with open_regular(source) as file:
            return _decode_file(file, max_pixels, side)
    except ImageError as error:
        raise ImageError(f"{_name(source)}: {error}", error.reason) from error
    except HimoError as error:  # of open_regular, which names the path
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        missing = isinstance(cause, ValueError) or number not in (None, errno.ENXIO)
        raise ImageError(str(error), "missing" if missing else "not_a_file") from error
    except Exception as error:  # the plug-ins raise what they come upon, from KeyError on
        raise ImageError(
            f"{_name(source)}: {error or type(error).__name__}", _reason(error)
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = loads_truncated


def _decode_file(
    file: BinaryIO, max_pixels: int, side: int | None
) -> tuple[Image.Image, tuple[int, int]]:
    start = file.read(16)
    if not start:
        raise ImageError("empty file", "truncated")
    plugin = next((plugin for magic, plugin in _FORMATS if magic.match(start)), None)
    if plugin is None:
        raise ImageError(f"not {_FORMAT_NAMES}: starts with {start!r}", "unknown_format")
    if plugin is GifImagePlugin.GifImageFile:
        _check_pixels(_gif_size(file), max_pixels)
    if plugin is PngImagePlugin.PngImageFile:
        _check_png_texts(file)
    file.seek(0)
    image = plugin(file)
    size = image.size
    _check_pixels(size, max_pixels)
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        file.seek(0)
        scans = _jpeg_scans(file.read())
        if scans * size[0] * size[1] > _MAX_SCANS * max_pixels:
            raise ImageError(f"{scans} scans of {size[0]} x {size[1]} pixels", "too_large")
        if side is not None:
            image.draft(None, (side, side))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = image.tag_v2.get(_TILE_WIDTH, 0), image.tag_v2.get(_TILE_LENGTH, 0)
        _check_pixels(tile, max_pixels)
    image.load()
    return image, size


def _reason(error: Exception) -> Reason:
    """The kind of what a plug-in of Pillow raised, as far as it can be told."""
    text = str(error).lower()
    if isinstance(
        error, MemoryError | Image.DecompressionBombError | Image.DecompressionBombWarning
    ):
        return "too_large"
    if "too large" in text or "too much memory" in text:
        return "too_large"
    short = (EOFError, IndexError, struct.error)
    if isinstance(error, short) or isinstance(error.__cause__, short) or "truncated" in text:
        return "truncated"
    if isinstance(error, OSError) and error.errno is not None:
        return "missing"  # a read that failed
    return "corrupt"


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if max(size) > _MAX_SIDE:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels, a side of more than {_MAX_SIDE:,}", "too_large"
        )
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels, more than max_pixels = {max_pixels:,}", "too_large"
        )


def _gif_size(file: BinaryIO) -> tuple[int, int]:
    """The width and height that the screen and the first frame of a GIF span.

    Pillow lets a frame exceed the screen, and allocates it while it reads the header.
    """
    file.seek(6)
    width, height, flags = struct.unpack("<HHB", file.read(5))
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    while (block := file.read(1)) not in (b",", b";", b""):
        if block == b"!":
            file.seek(1, os.SEEK_CUR)  # the kind of extension
            while length := file.read(1)[0]:
                file.seek(length, os.SEEK_CUR)
    if block == b",":
        left, top, frame_width, frame_height = struct.unpack("<HHHH", file.read(8))
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return width, height


def _check_png_texts(file: BinaryIO) -> None:
    """Refuses a PNG with so much compressed text that unpacking it would take tens of MiB."""
    file.seek(8)
    texts = 0
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        texts += kind in (b"zTXt", b"iTXt")
        file.seek(length + 4, os.SEEK_CUR)  # and the checksum
    if texts > _MAX_TEXTS:
        raise ImageError(f"{texts} chunks of compressed text", "too_large")


# A marker, but not a stuffed byte, a restart marker or padding.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


def _jpeg_scans(data: bytes) -> int:
    """The number of scans of the first image in a JPEG file."""
    scans, position = 0, 2
    while (found := _JPEG_MARKER.search(data, position)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return scans
