"""TIFF: the first image of a file, as a file of its own.

Pillow reads every tag of a TIFF, metadata included, and libtiff reads the file itself. Here they
get a small file with only the pixels and the checked tags that describe them: nothing in it causes
a warning, and nothing costs more than pixels do.
"""

import ctypes
import io
import math
import struct
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import Any

from PIL import TiffImagePlugin, _imaging

from himo.images.jpeg import check_scans, scans_of
from himo.images.limits import SLOW, USUAL_BITS, ImageError, Reader

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PLANES = 256, 257, 258, 259, 277, 284
_STRIP_OFFSETS, _STRIP_BYTES, _STRIP_ROWS = 273, 279, 278
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_PHOTOMETRIC, _FORMAT = 262, 339
_SEGMENTS = {_STRIP_OFFSETS, _STRIP_BYTES, _STRIP_ROWS, _TILE_OFFSETS, _TILE_BYTES}
# Also fill order, orientation, two kinds of fax, predictor, and the position of YCbCr's colours.
_OF_ONE_VALUE = {_WIDTH, _LENGTH, _COMPRESSION, _SAMPLES, _PLANES, _TILE_WIDTH, _TILE_LENGTH}
_OF_ONE_VALUE |= {_PHOTOMETRIC, 266, 274, 292, 293, 317, 531}
# Also colour map, extra samples, JPEG tables, and more about YCbCr.
_OF_VALUES = {_BITS, _FORMAT, 320, 338, 347, 529, 530, 532}

_NONE, _JPEG, _LZMA = 1, 7, 34925
# Also three kinds of fax, LZW, two of deflate, PackBits and Zstandard.
_COMPRESSIONS = {_NONE, _JPEG, _LZMA, 2, 3, 4, 5, 8, 32946, 32773, 50000}

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I"}  # by type, for struct
_LONG = 4
_UNSIGNED = 1  # of the sample formats
_MAX_SEGMENTS = 20_000


def read(reader: Reader) -> TiffImagePlugin.TiffImageFile:
    """The first image of a TIFF file, to be decoded; of its metadata the orientation."""
    _silence_libtiff()
    directory = _Directory(reader)
    compression = directory.number(_COMPRESSION, _NONE)
    if compression not in _COMPRESSIONS:
        raise ImageError(f"compression {compression} of TIFF is not read", "unknown_format")
    size = width, length = directory.number(_WIDTH), directory.number(_LENGTH)
    bits, samples = directory.number(_BITS, 1), directory.number(_SAMPLES, 1)
    if samples > TiffImagePlugin.MAX_SAMPLESPERPIXEL:
        raise ImageError(f"{samples:,} samples a pixel", "unknown_format")
    cost = max(SLOW if compression == _LZMA else 1, bits * samples / USUAL_BITS)
    reader.check_pixels(width, length, bits * samples, cost)
    tiled = _STRIP_OFFSETS not in directory.entries
    if tiled:
        columns, rows = directory.number(_TILE_WIDTH), directory.number(_TILE_LENGTH)
        reader.check_pixels(columns, rows, bits * samples)
    else:
        columns, rows = width, min(directory.number(_STRIP_ROWS, length), length)
    if not width or not length or not columns or not rows:
        raise ImageError(f"{width} x {length} pixels in parts of {columns} x {rows}")
    planes = samples if directory.number(_PLANES, 1) == 2 else 1
    across, down = math.ceil(width / columns), math.ceil(length / rows)
    if bits > 8:
        _check_deep(directory, bits, compression, planes)
    count = planes * across * down
    if count > _MAX_SEGMENTS:
        raise ImageError(f"{count:,} strips or tiles, more than {_MAX_SEGMENTS:,}", "too_large")

    offsets = directory.numbers(_TILE_OFFSETS if tiled else _STRIP_OFFSETS, count)
    if compression == _NONE:  # as in Pillow, which ignores the stated numbers of bytes
        row_bytes = math.ceil(columns * bits * (samples // planes) / 8)
        heights = [rows] * down if tiled else [min(rows, length - rows * n) for n in range(down)]
        sizes = [row_bytes * height for height in heights for _ in range(across)] * planes
    else:
        sizes = list(directory.numbers(_TILE_BYTES if tiled else _STRIP_BYTES, count))
    segments = []
    for offset, size_bytes in zip(offsets, sizes, strict=False):
        reader.goto(offset)
        segments.append(reader.exactly(size_bytes))
    if compression == _JPEG:
        scans = max(scans_of(segment)[0] for segment in segments)
        check_scans(reader, size, scans, sum(map(len, segments)))

    tags = {tag: directory.data(tag, 1) for tag in _OF_ONE_VALUE & directory.entries.keys()}
    tags |= {tag: directory.data(tag) for tag in _OF_VALUES & directory.entries.keys()}
    if planes == 1:  # Pillow takes one plane by itself for something else
        tags.pop(_PLANES, None)
    if not tiled:
        tags[_STRIP_ROWS] = (_LONG, struct.pack(f"{directory.order}I", rows))
    return TiffImagePlugin.TiffImageFile(_file(directory.order, tags, tiled, segments))


def _check_deep(directory: "_Directory", bits: int, compression: int, planes: int) -> None:
    """Refuses values of more than 8 bits that Pillow silently misreads."""
    unsigned = directory.number(_FORMAT, _UNSIGNED) == _UNSIGNED
    compressed_big_endian = directory.order == ">" and compression != _NONE
    for is_misread, values in (
        (directory.number(_PHOTOMETRIC, 1) == 0, "with white at 0"),
        (planes > 1, "with a plane for each channel"),
        (bits == 32 and unsigned, "without a sign"),  # from 2 ** 31 on they become negative
        (compressed_big_endian and not unsigned, "signed or floats, big-endian and compressed"),
    ):
        if is_misread:
            raise ImageError(f"values of {bits} bits {values} are not read", "unknown_format")


class _Directory:
    """The tags of the first image: type, number of values, and the values or where they are."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        start = reader.exactly(8)
        self.order = "<" if start[:2] == b"II" else ">"
        reader.goto(self._unpack("I", start[4:])[0])
        wanted = _OF_ONE_VALUE | _OF_VALUES | _SEGMENTS
        self.entries: dict[int, tuple[int, int, bytes]] = {}
        # As in Pillow, the end of the file ends the tags, tags larger than the file are skipped,
        # and the first of several counts.
        for _ in range(self._unpack("H", reader.exactly(2))[0]):
            if len(entry := reader.take(12)) < 12:
                break
            tag, kind, count, value = self._unpack("HHI4s", entry)
            if tag in wanted and 0 < count * _TYPE_BYTES.get(kind, 0) <= reader.size:
                self.entries.setdefault(tag, (kind, count, value))

    def data(self, tag: int, most: int | None = None) -> tuple[int, bytes]:
        """The type and the bytes of a tag, with at most `most` values."""
        if tag not in self.entries:
            raise ImageError(f"no tag {tag}, which its pixels need")
        kind, count, value = self.entries[tag]
        count = count if most is None else min(count, most)
        if self.entries[tag][1] * _TYPE_BYTES[kind] <= 4:
            return kind, value[: count * _TYPE_BYTES[kind]]
        self._reader.goto(self._unpack("I", value)[0])
        return kind, self._reader.exactly(count * _TYPE_BYTES[kind])

    def numbers(self, tag: int, most: int) -> tuple[int, ...]:
        kind, data = self.data(tag, most)
        if kind not in _INTEGERS:
            raise ImageError(f"tag {tag} has values of type {kind}, expected integers")
        return self._unpack(f"{len(data) // _TYPE_BYTES[kind]}{_INTEGERS[kind]}", data)

    def number(self, tag: int, default: int | None = None) -> int:
        if default is not None and tag not in self.entries:
            return default
        return self.numbers(tag, 1)[0]

    def _unpack(self, form: str, data: bytes) -> tuple[Any, ...]:
        return struct.unpack(self.order + form, data)


def _file(
    order: str, tags: dict[int, tuple[int, bytes]], tiled: bool, segments: list[bytes]
) -> io.BytesIO:
    """A TIFF file of one image: the directory, the values that do not fit in it, the pixels."""
    offsets, sizes = (_TILE_OFFSETS, _TILE_BYTES) if tiled else (_STRIP_OFFSETS, _STRIP_BYTES)
    packed = struct.pack(f"{order}{len(segments)}I", *map(len, segments))
    tags |= {offsets: (_LONG, packed), sizes: (_LONG, packed)}  # offsets: as long, filled in below
    values_at = 8 + 2 + 12 * len(tags) + 4
    position = values_at + sum(len(data) for _, data in tags.values() if len(data) > 4)
    starts = list(accumulate(map(len, segments[:-1]), initial=position))
    tags[offsets] = (_LONG, struct.pack(f"{order}{len(segments)}I", *starts))
    entries, values = bytearray(), bytearray()
    for tag, (kind, data) in sorted(tags.items()):
        entries += struct.pack(f"{order}HHI", tag, kind, len(data) // _TYPE_BYTES[kind])
        if len(data) <= 4:
            entries += data.ljust(4, b"\0")
        else:
            entries += struct.pack(f"{order}I", values_at + len(values))
            values += data
    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return io.BytesIO(b"".join([start, entries, bytes(4), values, *segments]))


@cache
def _silence_libtiff() -> None:
    # libtiff writes its errors to stderr, even where the exception that Pillow raises is caught.
    # Pillow turns off libtiff's warnings for the whole process, but not its errors.
    with suppress(OSError, AttributeError):  # a Pillow that does not export libtiff
        handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
        handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        handler(None)
