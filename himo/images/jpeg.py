"""JPEG: the parts of a file that its decoder needs."""

import io
import re
import struct

from PIL import JpegImagePlugin

from himo.images.limits import SLOW, ImageError, Reader

# Each scan of a progressive JPEG decodes the whole image, and an empty one takes ten bytes of the
# file. Encoders write about ten scans; an image at the limit of pixels may have this many.
_MAX_SCANS = 20
# Bytes of all scans of a progressive JPEG; each byte takes about 40 ns.
_MAX_SCAN_BYTES = 40_000_000
_CHANNELS = 4  # at most; a sequential JPEG has at most one scan for each
# Of one file: an encoder writes up to a few hundred, for long metadata.
_MAX_SEGMENTS = 4096

# Of the scans of any JPEG, in addition to 2 bytes for each pixel at the limit.
_MIN_BYTES = 1 << 20
# libjpeg rescans a run of padding from its start where a block of its input ends within it.
_PADDING = bytes([0xFF]) * 4096

_START_OF_SCAN, _END = 0xDA, 0xD9
_ALONE = {0x01, *range(0xD0, 0xDA)}  # markers without a segment
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SLOW_FRAMES = _FRAMES - {0xC0, 0xC1, 0xC2}  # lossless, or with arithmetic coding
# Pillow reads Exif while it opens a file, and warns. 0xE0 and 0xEE name the colour space.
_METADATA = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
# A marker, but not a stuffed byte, a restart marker or padding.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


def read(reader: Reader) -> JpegImagePlugin.JpegImageFile:
    """The first image of a JPEG file, to be decoded."""
    parts = [reader.exactly(2)]
    width = height = 0
    for _ in range(_MAX_SEGMENTS):
        marker = _next_marker(reader)
        if marker in _ALONE:
            continue
        length = reader.exactly(2)
        count = max(0, int.from_bytes(length) - 2)
        if marker in _METADATA:
            reader.skip(count)
            continue
        segment = reader.exactly(count)
        parts.append(bytes([0xFF, marker]) + length + segment)
        if marker in _FRAMES and len(segment) >= 6:
            height, width, channels = struct.unpack(">HHB", segment[1:6])
            cost = SLOW if marker in _SLOW_FRAMES else 1
            reader.check_pixels(width, height, 8 * min(channels, _CHANNELS), cost)
        if marker == _START_OF_SCAN:
            break
    else:
        raise ImageError(f"more than {_MAX_SEGMENTS:,} segments", "too_large")
    data, whole = reader.rest(_MIN_BYTES + 2 * reader.max_pixels)
    if _PADDING in data:
        raise ImageError(f"padding of more than {len(_PADDING):,} bytes", "too_large")
    scans, end = scans_of(data)
    if end is None and not whole:
        raise ImageError(f"no end within {len(data):,} bytes of pixels", "too_large")
    check_scans(reader, (width, height), 1 + scans, len(data) if end is None else end)
    parts.append(data[:end])
    return JpegImagePlugin.JpegImageFile(io.BytesIO(b"".join(parts)))


def scans_of(data: bytes) -> tuple[int, int | None]:
    """The number of scans that begin in the data, and where its image ends, if it does."""
    scans, position = 0, 0
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, position)
        if found is None:
            return scans, None
        if found[1][0] == _END:
            return scans, found.end()
        scans += found[1][0] == _START_OF_SCAN
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    raise ImageError(f"more than {_MAX_SEGMENTS:,} segments", "too_large")


def check_scans(reader: Reader, size: tuple[int, int], scans: int, length: int) -> None:
    """Refuses an image whose scans, of `length` bytes in all, would take too long."""
    share = size[0] * size[1] / reader.max_pixels
    if scans * share > _MAX_SCANS or (scans > _CHANNELS and length > _MAX_SCAN_BYTES):
        text = f"{scans} scans of {size[0]} x {size[1]} pixels in {length:,} bytes"
        raise ImageError(text, "too_large")


def _next_marker(reader: Reader) -> int:
    """The second byte of the next marker; bytes between segments are skipped."""
    byte = reader.exactly(1)
    while True:
        while byte != b"\xff":
            byte = reader.exactly(1)
        while byte == b"\xff":
            byte = reader.exactly(1)
        if byte != b"\0":
            return byte[0]
