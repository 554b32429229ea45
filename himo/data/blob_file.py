"""A file of bytes read by offset, with a JSON header at its end: the frame of the cached files.

Such a file lies next to the data, where anyone may have put or changed it, so it is trusted no more
than the data: no link to it is followed, and any fault in it is a DamagedFile. Layout,
little-endian:

    8 bytes    magic
    body       what the caller wrote
    header     JSON
    24 bytes   offset, length and CRC-32 of the header, and four bytes of magic
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from himo.errors import HimoError
from himo.files import atomic_path, regular_descriptor

_END = struct.Struct("<qqI4s")
_MAX_HEADER = 1 << 21  # bytes; a thousand folders of the longest names take a fourth of it


class DamagedFile(HimoError):
    """A file that is not what its name says, or a damaged one."""


@dataclass(frozen=True)
class Frame:
    """The kind of a file: `magic` at its start, `end` at its end, `name` for messages."""

    magic: bytes
    end: bytes
    name: str

    @contextmanager
    def create(self, path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
        """Yields a file with its magic, to be finished; it becomes `path`, whole or not at all."""
        with (
            atomic_path(path, follow_links=False) as temporary,
            open(temporary, "wb", buffering=1 << 20) as file,
        ):
            file.write(self.magic)
            yield file

    def finish(self, file: BinaryIO, offset: int, header: dict[str, Any]) -> None:
        """Writes the header, which begins at `offset`, and the end of the file."""
        text = json.dumps(header).encode()
        file.write(text)
        file.write(_END.pack(offset, len(text), zlib.crc32(text), self.end))


class BlobFile:
    """An open file of a frame.

    Attributes:
        header: the decoded JSON.
        body_end: offset of the header.

    Raises:
        DamagedFile: there is no such file, or a damaged one.
    """

    def __init__(self, path: str, frame: Frame) -> None:
        self.path, self._frame = path, frame
        self._descriptor = -1
        try:
            self._descriptor = regular_descriptor(path, follow_links=False)
        except HimoError as error:
            raise DamagedFile(str(error)) from error
        size = os.fstat(self._descriptor).st_size
        if size < len(frame.magic) + _END.size:
            raise self.damaged("is too short")
        offset, length, crc, end = _END.unpack(self.read(size - _END.size, _END.size))
        if self.read(0, len(frame.magic)) != frame.magic or end != frame.end:
            raise self.damaged(f"is not {frame.name} of this version")
        if not 0 <= length <= _MAX_HEADER or offset + length + _END.size != size:
            raise self.damaged("has a damaged header")
        text = self.read(offset, length)
        try:
            if zlib.crc32(text) != crc:
                raise ValueError("wrong checksum")
            self.header: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.damaged("has a damaged header") from error
        self.body_end = offset

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; DamagedFile if the file ends before."""
        # Not by mmap: a file that is truncated meanwhile would then kill the process. The pages are
        # the system's, shared by all processes, either way.
        try:
            data = os.pread(self._descriptor, length, offset)
        except (OSError, OverflowError, ValueError) as error:
            raise self.damaged("cannot be read") from error
        if len(data) < length:
            raise self.damaged("is cut off")
        return data

    def damaged(self, what: str) -> DamagedFile:
        """The error that the file is damaged."""
        kind = self._frame.name.rpartition(" ")[2]
        return DamagedFile(f"{self.path}: {what}; remove it to have the {kind} built again")

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
