"""Image files that state little and cost much, or would, each made by a few lines.

Every function writes nothing: it returns the bytes of a file, or `Sparse` for one that is mostly a
hole and is made by truncate().
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MIB, GIB = 1 << 20, 1 << 30


@dataclass
class Sparse:
    """Bytes, then zeros up to a size of which the disk holds nothing."""

    start: bytes
    size: int


def write(path: Path, content: bytes | Sparse) -> None:
    path.write_bytes(content.start if isinstance(content, Sparse) else content)
    if isinstance(content, Sparse):
        with path.open("r+b") as file:
            file.truncate(content.size)


def picture(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 3, y * 5, x + y], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format, **options)
    return buffer.getvalue()


# JPEG


def segment(marker: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(data)) + data


def jpeg(more: bytes = b"", after: bytes = b"", side: int = 64, **options: object) -> bytes:
    """A JPEG with `more` before its first segment and `after` at its end, inside of it."""
    data = encoded("JPEG", picture(side, side), **options)
    return data[:2] + more + data[2:-2] + after + data[-2:]


def jpeg_of_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    data = encoded("JPEG", Image.new("RGB", (side, side), (9, 8, 7)), progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def jpeg_stating(side: int, frame: int = 0xC0, **options: object) -> bytes:
    """A small JPEG whose header states another size and another kind of frame."""
    data = bytearray(encoded("JPEG", **options))
    at = min(
        data.index(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in data
    )
    data[at + 1] = frame
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


# PNG


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def zeros(count: int, byte: int = 0) -> bytes:
    """So many zeros, or other bytes, as zlib packs them in blocks that are independent."""

    def packed(length: int) -> bytes:
        packer = zlib.compressobj(9, wbits=-15)
        return packer.compress(bytes([byte]) * length) + packer.flush(zlib.Z_FULL_FLUSH)

    # Adler-32: one plus the sum of the bytes, and the sum of these sums.
    sums = count + byte * count * (count + 1) // 2, 1 + byte * count
    checksum = struct.pack(">HH", *(each % 65_521 for each in sums))
    return b"\x78\xda" + packed(MIB) * (count // MIB) + packed(count % MIB) + b"\3\0" + checksum


def png(
    side: int = 64,
    depth: int = 8,
    colour: int = 2,
    interlaced: int = 0,
    before: bytes = b"",
    after: bytes = b"",
    more: int = 0,
    byte: int = 0,
) -> bytes:
    """A PNG of zeros, complete; `more` zeros than its pixels take, and chunks around them.

    Ones for `byte` are filters and differences from the left, so that each row is a ramp.
    """
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    count = side * (1 + -(-side * bits // 8)) * (2 if interlaced else 1) + more
    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, interlaced)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zeros(count, byte))
        + after
        + chunk(b"IEND")
    )


def png_in_pieces(empty: int) -> bytes:
    data = png()
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"IDAT") * empty + data[at:]


def texts(count: int, kind: bytes = b"zTXt") -> bytes:
    packed = zeros(MIB - 100)  # just what Pillow accepts for each
    middle = b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0"
    return b"".join(chunk(kind, b"k%d" % number + middle + packed) for number in range(count))


# WebP


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    data = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(data) if size is None else size) + data


def part(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def canvas(width: int, height: int, flags: int = 0x02) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return part(b"VP8X", bytes([flags, 0, 0, 0]) + sides)


def vp8l(side: int = 64) -> bytes:
    """The chunk of a lossless image of one colour, whose pixels take no bits."""
    data = bytearray(encoded("WEBP", Image.new("RGB", (16, 16), (1, 2, 3)), lossless=True)[12:])
    bits = struct.unpack("<I", data[9:13])[0] >> 28 << 28
    data[9:13] = struct.pack("<I", bits | (side - 1) | (side - 1) << 14)
    return bytes(data)


def frame(side: int = 64) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    return part(b"ANMF", bytes(6) + size + size + bytes(4) + vp8l(side))


def webp(side: int, *more: bytes, frames: int = 1) -> bytes:
    """An animated WebP: a large canvas costs memory, whatever the frames are."""
    small = min(side, 64)
    return riff(canvas(side, side), part(b"ANIM", bytes(6)), *more, *[frame(small)] * frames)


# GIF


def gif(
    side: int = 64, before: bytes = b"", data: bytes | None = None, after: bytes = b""
) -> bytes:
    """A GIF with extensions before its frame, other compressed data, or more after it."""
    made = encoded("GIF", Image.new("L", (side, side), 7))
    at = made.index(b",", 13 + 3 * (2 << (made[10] & 7)) if made[10] & 0x80 else 13)
    start, descriptor, pixels = made[:at], made[at : at + 10], made[at + 10 : -1]
    return start + before + descriptor + (pixels if data is None else data) + after + b";"


def blocks(size: int, count: int) -> bytes:
    """So many sub-blocks of GIF, of so many zeros each."""
    return (bytes([size]) + bytes(size)) * count + b"\0"


# BMP and PPM


def bmp(width: int, height: int, compression: int, data: bytes, colours: int = 256) -> bytes:
    depth = 4 if compression == 2 else 8
    palette = bytes(range(256)) * (4 * colours // 256)
    offset = 54 + len(palette)
    return (
        b"BM"
        + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
        + struct.pack(
            "<IiiHHIIiiII", 40, width, height, 1, depth, compression, len(data), 0, 0, colours, 0
        )
        + palette
        + data
    )


# TIFF


def tiff(
    tags: dict[int, tuple[int, int, bytes | int]], pixels: bytes = b"", order: str = "<"
) -> bytes:
    """A TIFF with pixels at 8 and tags by number: type, count, and the values or where they are."""
    values_at = 8 + len(pixels)
    values, entries = b"", b""
    for tag, (kind, count, value) in sorted(tags.items()):
        if isinstance(value, bytes):
            where = value.ljust(4, b"\0") if len(value) <= 4 else None
            if where is None:
                where = struct.pack(f"{order}I", values_at + len(values))
                values += value
        else:
            where = struct.pack(f"{order}I", value)
        entries += struct.pack(f"{order}HHI", tag, kind, count) + where
    start = struct.pack(
        f"{order}2sHI", b"II" if order == "<" else b"MM", 42, values_at + len(values)
    )
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return start + pixels + values + directory


def longs(*numbers: int) -> tuple[int, int, bytes]:
    return 4, len(numbers), struct.pack(f"<{len(numbers)}I", *numbers)


def grey_tiff(
    width: int,
    height: int,
    pixels: bytes,
    compression: int = 1,
    more: dict[int, tuple[int, int, bytes | int]] | None = None,
) -> bytes:
    """A grey TIFF of one strip, unless `more` tags say otherwise."""
    tags: dict[int, tuple[int, int, bytes | int]] = {
        256: longs(width),
        257: longs(height),
        258: longs(8),
        259: longs(compression),
        262: longs(1),
        273: longs(8),
        277: longs(1),
        278: longs(height),
        279: longs(len(pixels)),
    }
    return tiff(tags | (more or {}), pixels)


def same_strip(rows: int, pixels: bytes, compression: int) -> bytes:
    """A TIFF of one row a strip, every one of which is all of the same pixels."""
    more = {278: longs(1), 273: longs(*[8] * rows), 279: longs(*[len(pixels)] * rows)}
    return grey_tiff(64, rows, pixels, compression, more)


def tiles(side: int, count: int) -> bytes:
    more = {322: longs(side), 323: longs(side)}
    more |= {324: longs(*[8] * count), 325: longs(*[side * side] * count)}
    data = grey_tiff(1000, 1000, bytes(side * side), 1, more)
    return data.replace(struct.pack("<HH", 273, 4), struct.pack("<HH", 65_000, 4), 1)
