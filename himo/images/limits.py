"""Limits on the cost of one image, and the error of every file that cannot be used.

The limits are on numbers in the file, not on time: the same images of a data set are then bad on
every machine and after every resume. With them, reading one image takes at most 2 s of a processor
and 64 MiB plus 32 bytes a pixel of memory.
"""

import os
from typing import BinaryIO, Literal

from himo.errors import HimoError

Reason = Literal["missing", "not_a_file", "too_large", "truncated", "unknown_format", "corrupt"]

MAX_PIXELS = 50_000_000
_MAX_SIDE = 65_535  # the largest of JPEG and GIF; a longer side belongs to a strip, not a picture
# Bytes read of a file: 1.5 times the bytes of its pixels, which noise takes after LZW or in the
# best JPEG, and more for its structure.
_EXPANSION = 1.5
_LEAST_BITS = 8  # of a pixel: fax coding makes dithered pixels of two levels longer
_SPARE_BYTES = 1 << 20
_MAX_PIECES = 100_000
USUAL_BITS = 24  # of a pixel of cost 1
SLOW = 50  # the cost of a pixel that takes Pillow or its libraries up to a microsecond


class ImageError(HimoError):
    """An image that cannot be used, and why.

    `reason` is one of: missing (no such file, or no right to read it), not_a_file (a directory,
    FIFO or device), too_large (pixels, or the work and memory that they would take), truncated,
    unknown_format (none of the formats read, or pixels that have no RGB of 8 bits), corrupt.
    """

    reason: Reason

    # Only one argument is required, so that the exception can be pickled, and a DataLoader can
    # raise it again in the main process.
    def __init__(self, message: str, reason: Reason = "corrupt") -> None:
        super().__init__(message)
        self.reason = reason


class Reader:
    """Reads an image file in pieces, with a limit on their number and on their bytes.

    Args:
        file: the file, at its start.
        max_pixels: the most pixels that the image may have.
        decodings: how often it is decoded in all; the limit on pixels is divided by it.
    """

    def __init__(self, file: BinaryIO, max_pixels: int, decodings: int = 1) -> None:
        self._file, self.max_pixels, self._decodings = file, max_pixels, decodings
        self.size = file.seek(0, os.SEEK_END)  # of the file
        self._file.seek(0)
        self._bytes, self._pieces, self._allowed = _SPARE_BYTES, _MAX_PIECES, 0

    def check_pixels(self, width: int, height: int, bits: int, cost: float = 1) -> None:
        """Refuses an image by its size, and allows as many bytes as an image of that size takes.

        Args:
            width: in pixels.
            height: in pixels.
            bits: of a pixel, before compression.
            cost: time of a pixel of this kind relative to a usual one; the limit on pixels is
                divided by it.
        """
        if max(width, height) > _MAX_SIDE:
            text = f"{width} x {height} pixels, a side of more than {_MAX_SIDE:,}"
            raise ImageError(text, "too_large")
        cost *= self._decodings
        if width * height * cost > self.max_pixels:
            work = f" that take {cost:.3g} times as long as usual" if cost > 1 else ""
            text = f"{width} x {height} pixels{work}, more than max_pixels = {self.max_pixels:,}"
            raise ImageError(text, "too_large")
        allowed = int(_EXPANSION * width * height * max(bits, _LEAST_BITS) / 8)
        self._bytes += max(0, allowed - self._allowed)  # a file may state several sizes
        self._allowed = max(allowed, self._allowed)

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end of the file; ImageError beyond a limit."""
        self._count_piece()
        data = self._file.read(max(0, min(count, self._bytes + 1)))
        self._bytes -= len(data)
        if self._bytes < 0:
            raise ImageError("more data than its pixels can take", "too_large")
        return data

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes; ImageError where the file ends before."""
        data = self.take(count)
        if len(data) < count:
            raise ImageError(f"cut off at {self.size:,} bytes", "truncated")
        return data

    def rest(self, most: int | None = None) -> tuple[bytes, bool]:
        """The rest of the file up to the limit on bytes, and whether it is complete."""
        data = self.take(min(self._bytes, self.size, self.size if most is None else most))
        return data, self._file.tell() >= self.size

    def skip(self, count: int) -> None:
        """Skips bytes, which may lie beyond the end of the file."""
        self._count_piece()
        self._file.seek(count, os.SEEK_CUR)

    def goto(self, position: int) -> None:
        """Moves to a position from the start of the file."""
        self._count_piece()
        self._file.seek(position)

    @property
    def position(self) -> int:
        return self._file.tell()

    def _count_piece(self) -> None:
        self._pieces -= 1
        if self._pieces < 0:
            raise ImageError(f"in more than {_MAX_PIECES:,} pieces", "too_large")
