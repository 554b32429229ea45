"""WebP, GIF, BMP and binary PPM: the parts of a file that its decoder needs."""

import io
import re
import struct

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, WebPImagePlugin

from himo.images.limits import SLOW, ImageError, Reader

_RLE_SPARE = 1 << 16  # bytes of run lengths, in addition to 2 for each pixel
_WEBP_CHUNKS = (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF")
_WEBP_FLAGS = 0x10 | 0x02  # of VP8X: alpha and animation, not the metadata
_WEBP_COST = 1.6  # of a pixel, measured against PNG


def read_webp(reader: Reader) -> WebPImagePlugin.WebPImageFile:
    """The first frame of a WebP file, to be decoded."""
    start = reader.exactly(12)
    end = 8 + int.from_bytes(start[4:8], "little")
    if end > reader.size:
        raise ImageError(f"cut off at {reader.size:,} of {end:,} bytes", "truncated")
    parts = list[bytes]()
    seen = set[bytes]()
    while reader.position + 8 <= end:
        header = reader.exactly(8)
        kind, length = header[:4], int.from_bytes(header[4:], "little")
        length += length % 2
        if kind in seen or kind not in _WEBP_CHUNKS:
            reader.skip(length)
            continue
        seen.add(kind)
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            chunk = reader.exactly(min(length, 10))
            if (size := _webp_size(kind, chunk)) is not None:
                reader.check_pixels(*size, 32, _WEBP_COST)
            if kind == b"VP8X" and chunk:
                chunk = bytes([chunk[0] & _WEBP_FLAGS]) + chunk[1:]
            chunk += reader.exactly(length - len(chunk))
        else:
            chunk = reader.exactly(length)
        parts.append(header + chunk)
    data = b"WEBP" + b"".join(parts)
    return WebPImagePlugin.WebPImageFile(
        io.BytesIO(b"RIFF" + len(data).to_bytes(4, "little") + data)
    )


def _webp_size(kind: bytes, chunk: bytes) -> tuple[int, int] | None:
    if len(chunk) < (5 if kind == b"VP8L" else 10):
        return None  # libwebp refuses it
    if kind == b"VP8X":
        return 1 + int.from_bytes(chunk[4:7], "little"), 1 + int.from_bytes(chunk[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(chunk[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", chunk[6:10])
    return width & 0x3FFF, height & 0x3FFF


def read_gif(reader: Reader) -> GifImagePlugin.GifImageFile:
    """The first frame of a GIF file, to be decoded.

    The image spans the screen and the frame: Pillow lets the frame exceed the screen, and allocates
    it while it reads the header.
    """
    start = reader.exactly(13)
    width, height, flags = struct.unpack("<HHB", start[6:11])
    start += reader.exactly(3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control = b""
    while (block := reader.exactly(1)) not in b",;":
        if block != b"!":
            continue
        if reader.exactly(1) == b"\xf9":  # of the frame that follows: its transparent colour
            length = reader.exactly(1)[0]
            control = bytes([0x21, 0xF9, length]) + reader.exactly(length) + b"\0"
        while length := reader.exactly(1)[0]:
            reader.skip(length)
    frame = reader.exactly(9) if block == b"," else b""
    if frame:
        left, top, frame_width, frame_height = struct.unpack("<HHHH", frame[:8])
        reader.check_pixels(max(width, left + frame_width), max(height, top + frame_height), 8)
    data, _ = reader.rest()
    return GifImagePlugin.GifImageFile(io.BytesIO(start + control + block + frame + data))


def read_bmp(reader: Reader) -> BmpImagePlugin.BmpImageFile:
    """The image of a BMP file, to be decoded."""
    start = reader.exactly(26)
    if start[14] == 12:
        width, height, _, bits = struct.unpack("<HHHH", start[18:26])
        compression = 0
    else:
        start += reader.exactly(8)
        width, height, _, bits, compression = struct.unpack("<iiHHI", start[18:34])
    # Run lengths are decoded in Python.
    run_lengths = compression in (1, 2)
    reader.check_pixels(abs(width), abs(height), min(bits, 32), SLOW if run_lengths else 1)
    data, _ = reader.rest()
    if run_lengths:
        data = data[: 2 * abs(width * height) + _RLE_SPARE]
    return BmpImagePlugin.BmpImageFile(io.BytesIO(start + data))


_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PPM = re.compile(rb"P([456])" + 2 * (_SPACE + rb"(\d{1,9})"))
_PPM_MAXIMUM = re.compile(_SPACE + rb"(\d{1,9})")
_PPM_HEADER = 1 << 14  # bytes, most of them comments


def read_ppm(reader: Reader) -> Image.Image:
    """The image of a binary PBM, PGM or PPM file: bilevel, grey of 8 or 16 bits, or RGB of 8.

    By numpy, because Pillow decodes values of any range but 0 to 255 in Python.
    """
    start = reader.take(_PPM_HEADER)
    found = _PPM.match(start)
    if found is None:
        raise ImageError("no width and height at its start")
    kind, width, height = (int(number) for number in found.groups())
    if not width or not height:
        raise ImageError(f"{width} x {height} pixels")
    maximum, end = 1, found.end()
    if kind != 4:
        found = _PPM_MAXIMUM.match(start, end)
        if found is None or not 0 < int(found[1]) < 1 << 16:
            raise ImageError("no greatest value from 1 to 65,535 after its size")
        maximum, end = int(found[1]), found.end()
    channels = 3 if kind == 6 else 1
    type_ = np.dtype(">u2" if maximum > 255 else "u1")
    reader.check_pixels(width, height, 8 * channels * type_.itemsize)
    reader.goto(end + 1)  # behind one white space
    if kind == 4:
        data = reader.exactly(-(-width // 8) * height)
        return Image.frombytes("1", (width, height), data, "raw", "1;I")
    values = np.frombuffer(reader.exactly(width * height * channels * type_.itemsize), type_)
    values = values.reshape(height, width, channels).squeeze(-1 if channels == 1 else ())
    white = 65_535 if maximum > 255 and channels == 1 else 255
    if maximum != white:
        table = np.arange(1 << 8 * type_.itemsize) * white / maximum
        values = table.clip(max=white).round().astype("u2" if white > 255 else "u1")[values]
    return Image.fromarray(values.astype("<u2" if white > 255 else "u1", copy=False))
