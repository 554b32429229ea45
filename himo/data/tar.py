"""Tar archives: where the data of each member lies.

By hand instead of by tarfile: it takes a few microseconds a member, and a damaged or hostile header
raises HimoError and nothing else.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from himo.data.records import START, RecordError, check_uncompressed, decode
from himo.errors import HimoError, quoted

_OCTAL = re.compile(rb"[0-7]{1,8}")
_BLOCK = 512
_ZEROS = 1 << 20  # bytes searched at a time
_MAX_EXTENDED = 1 << 16  # bytes of a header that holds a long name


class Member(NamedTuple):
    name: str
    offset: int  # bytes from the start of the shard to the data
    size: int  # bytes
    is_file: bool  # not a link, a device or the like
    archive: int  # number of the archive, where several were joined


def members(shard: str, descriptor: int) -> Iterator[Member]:
    """Yields the members of an uncompressed tar archive, or of several joined: ustar, GNU or pax.

    Directories are skipped; `is_file` tells links and devices, which have no data here.

    Raises:
        HimoError: the archive is compressed, a header is damaged or the file ends early. How much
            is lost is then unknown, so it cannot be counted against a limit.
        RecordError: after the last member, if there is no end mark: the writer was stopped, or the
            copy was cut off between two members.
    """
    check_uncompressed(shard, os.pread(descriptor, START, 0))
    total = os.fstat(descriptor).st_size
    position = archive = 0
    # Name and size from the headers before a member, where its own cannot hold them.
    extended: dict[str, Any] = {}
    has_ended = False
    while position < total:
        header = os.pread(descriptor, _BLOCK, position)
        has_ended = not header.strip(b"\0")
        if has_ended:  # another archive may follow
            position, archive = _after_zeros(descriptor, position, total), archive + 1
            continue
        start = position + _BLOCK
        try:
            kind, name, size = _header(header)
            if kind in b"123456":  # links, devices, directories: no data, whatever the size says
                size = 0
            is_member = kind not in b"xLSgK"  # g and K may lie between a long name and its file
            if kind in b"xL":
                if size > _MAX_EXTENDED:
                    raise ValueError(f"header of {size:,} bytes")
                _extend(extended, kind, os.pread(descriptor, size, start))
            elif kind == b"S":
                raise ValueError("sparse files are not read")
            elif is_member:
                name, size = extended.get("name", name), extended.get("size", size)
                extended = {}
        except ValueError as error:
            raise HimoError(f"{shard}: damaged at byte {position:,}: {error}") from error
        position = start + -(-size // _BLOCK) * _BLOCK
        if position > total:
            raise HimoError(f"{shard}: ends in the middle of a file: is it complete?")
        if is_member and kind != b"5":
            yield Member(name, start, size, kind in b"0\x007", archive)
    if not has_ended:
        raise RecordError("cut_off", "ends without the mark of its end: is it complete?")


def _after_zeros(descriptor: int, position: int, total: int) -> int:
    """The first block from `position` on that is not all zeros; `total` if there is none."""
    while position < total:
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)  # skips a hole of any size
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing else follows
                break
            data = position  # a file system that does not support it
        position = max(position, data - data % _BLOCK)
        zeros = os.pread(descriptor, _ZEROS, position)
        if rest := zeros.lstrip(b"\0"):
            return position + (len(zeros) - len(rest)) // _BLOCK * _BLOCK
        if not zeros:
            break
        position += len(zeros)
    return total


def _header(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size in bytes of a tar header; ValueError if its checksum is wrong."""
    if len(header) < _BLOCK:
        raise ValueError("incomplete header: is it an uncompressed tar file, and whole?")
    given = header[148:156].strip(b" \0")
    found = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    if not _OCTAL.fullmatch(given) or int(given, 8) != found:
        raise ValueError("wrong checksum: is it an uncompressed tar file?")
    name = decode(header[:100].split(b"\0", 1)[0])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{decode(header[345:500].split(bytes(1), 1)[0])}/{name}"
    return header[156:157], name, _number(header[124:136])


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for sizes from 8 GiB on
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    else:
        value = int(field.strip(b" \0") or b"0", 8)
    if not 0 <= value < 1 << 62:
        raise ValueError(f"number {quoted(field)} is out of range")
    return value


def _extend(extended: dict[str, Any], kind: bytes, data: bytes) -> None:
    """Reads a GNU long name or the `path` and `size` of a pax header."""
    if kind == b"L":
        extended["name"] = decode(data.rstrip(b"\0"))
        return
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 10)
        length = data[position:space] if space > 0 else b""
        end = position + (int(length) if length.isdigit() else 0)
        if space < 0 or not space < end <= len(data):
            raise ValueError("damaged pax header")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        if key.startswith(b"GNU.sparse."):
            raise ValueError("sparse files are not read")
        if key == b"path":
            extended["name"] = decode(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise ValueError("damaged pax header")
            extended["size"] = int(value)
        position = end
