"""Tar shards as webdataset writes them: `{key}.jpg` next to `{key}.txt` or `{key}.json`.

Only the headers and the captions are read to make the index; an image is then one read at its
byte offset. The headers are parsed here because that takes a few microseconds a member, and because
what a damaged or hostile header can raise is then known: RecordError alone.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from himo.data.folder import IMAGE_SUFFIXES
from himo.data.records import (
    CAPTION_KEYS,
    DECODER,
    MAX_RECORD,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    decode,
    json_error,
    make_record,
    pick,
    quote,
    regular_file,
)
from himo.errors import HimoError
from himo.files import open_regular

MAX_IMAGE = 1 << 26  # bytes of one encoded image, which is read whole before it is looked at
_BLOCK = 512
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_SHARDS = 1_000_000
_MAX_EXTENDED = 1 << 16  # bytes of a header that holds a long name


class WebDataset(Source):
    """Tar shards with samples whose files share the name up to its first dot.

    Args:
        path: a shard, a directory of `*.tar`, or a numbered pattern such as `cc-{0000..0331}.tar`.
        caption_key: key of the caption in `{key}.json`; None takes `{key}.txt`, or else the key
            `title` or `caption`.
    """

    kind = "webdataset"

    def __init__(self, path: str | os.PathLike[str], caption_key: str | None = None) -> None:
        super().__init__(path)
        self.caption_key = caption_key
        self._shards = [os.path.abspath(shard) for shard in _expand(self.path)]

    @property
    def image_root(self) -> str | None:
        return None

    @property
    def shards(self) -> list[str]:
        return self._shards

    def options(self) -> dict[str, Any]:
        return {"caption_key": self.caption_key}

    def stamp(self) -> str:
        states = [(shard, regular_file(shard)) for shard in self._shards]
        return repr([(shard, state.st_size, state.st_mtime_ns) for shard, state in states])

    def size(self) -> int:
        return sum(regular_file(shard).st_size for shard in self._shards)

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        done = 0
        self.ignored = {"other files": 0}
        for number, shard in enumerate(self._shards):
            with open_regular(shard) as file:
                sample: dict[str, _Member] = {}
                key = ""
                for member in _members(shard, file.fileno()):
                    # The name up to the first dot after the last slash.
                    directory, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if f"{directory}/{stem}" != key:
                        if sample:
                            yield self._sample(number, file.fileno(), sample)
                        sample, key = {}, f"{directory}/{stem}"
                        progress(done + member.offset)
                    suffix = f".{suffix.lower()}"
                    kind = "image" if suffix in IMAGE_SUFFIXES else suffix
                    if kind not in {"image", ".txt", ".json"}:
                        self.ignored["other files"] += 1
                    elif kind in sample:
                        yield BadRecord("twice", f"{shard}: {quote(member.name)} comes twice")
                    else:
                        sample[kind] = member
                if sample:
                    yield self._sample(number, file.fileno(), sample)
                done += os.fstat(file.fileno()).st_size

    def _sample(
        self, number: int, descriptor: int, sample: dict[str, "_Member"]
    ) -> Record | BadRecord:
        name = next(iter(sample.values())).name
        try:
            if "image" not in sample:
                raise RecordError("missing_key", f"{quote(name)} has no image beside it")
            image = sample["image"]
            if image.size > MAX_IMAGE:
                raise RecordError("too_long", f"image is longer than {MAX_IMAGE:,} bytes")
            caption = self._caption(descriptor, sample)
            record = make_record(0, image.name, caption)
            return Record(0, record.image, record.caption, "", number, image.offset, image.size)
        except RecordError as error:
            return error.at(f"{self._shards[number]}: {quote(name)}")

    def _caption(self, descriptor: int, sample: dict[str, "_Member"]) -> Any:
        order = (".json", ".txt") if self.caption_key is not None else (".txt", ".json")
        kind = next((kind for kind in order if kind in sample), None)
        if kind is None:
            raise RecordError("missing_key", "image has no .txt or .json beside it")
        member = sample[kind]
        if member.size > MAX_RECORD:
            raise RecordError("too_long", f"{kind} is longer than {MAX_RECORD:,} bytes")
        text = decode(os.pread(descriptor, member.size, member.offset))
        if kind == ".txt":
            return text
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise json_error(error) from error
        if not isinstance(value, dict):
            raise RecordError("type", f"{kind} is {quote(value)}, expected an object")
        return value[pick(value, self.caption_key, CAPTION_KEYS, "caption key")]


def _expand(path: str) -> list[str]:
    """The shards that `path` names; HimoError if there are none or one is not there."""
    match = _RANGE.search(path)
    if match is None and os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith(".tar"))
        if not names:
            raise HimoError(f"{path}: expected a directory with .tar shards, found none")
        return [os.path.join(path, name) for name in names]
    paths = [path]
    while match is not None:
        first, last, width = int(match[1]), int(match[2]), len(match[1])
        if not 0 <= last - first < _MAX_SHARDS // len(paths):
            raise HimoError(f"{path}: expected a range such as {{0000..0331}}, got {match[0]}")
        start, end = match.span()
        paths = [f"{x[:start]}{i:0{width}}{x[end:]}" for x in paths for i in range(first, last + 1)]
        match = _RANGE.search(paths[0])
    missing = [shard for shard in paths if not os.path.exists(shard)]
    if missing:
        raise HimoError(f"{path}: {len(missing)} of {len(paths)} shards missing: {missing[0]}")
    return paths


class _Member(NamedTuple):
    name: str
    offset: int  # bytes from the start of the shard to the data
    size: int  # bytes


@dataclass
class _Extended:
    """What the headers before a member say about it: names and sizes that its own cannot hold."""

    name: str | None = None
    size: int | None = None


def _members(shard: str, descriptor: int) -> Iterator[_Member]:
    """Yields the regular files of an uncompressed tar archive: ustar, GNU or pax.

    Raises:
        HimoError: a header is damaged or the file ends early. How much is lost then is not known,
            so that it cannot be counted against a limit.
    """
    total = os.fstat(descriptor).st_size
    position = 0
    extended = _Extended()
    while position < total:
        header = os.pread(descriptor, _BLOCK, position)
        if not header.strip(b"\0"):
            return  # the end of the archive
        start = position + _BLOCK
        try:
            kind, name, size = _header(header)
            if kind in b"123456":  # links, devices, directories: no data, whatever the size says
                size = 0
            kept = None
            if kind in b"xL":
                if size > _MAX_EXTENDED:
                    raise ValueError(f"header of {size:,} bytes")
                _extend(extended, kind, os.pread(descriptor, size, start))
            elif kind == b"S":
                raise ValueError("sparse files are not read")
            elif kind not in b"gK":  # these stand between a long name and its file
                kept, extended = extended, _Extended()
                size = size if kept.size is None else kept.size
        except ValueError as error:
            raise HimoError(f"{shard}: damaged at byte {position:,}: {error}") from error
        if start + size > total:
            raise HimoError(f"{shard}: ends in the middle of a file: is it complete?")
        if kept is not None and kind in b"0\x007":
            yield _Member(name if kept.name is None else kept.name, start, size)
        position = start + -(-size // _BLOCK) * _BLOCK


def _header(header: bytes) -> tuple[bytes, str, int]:
    """Type, name and size in bytes of a tar header; ValueError if its checksum is wrong."""
    if len(header) < _BLOCK:
        raise ValueError("incomplete header")
    if sum(header[:148]) + sum(header[156:]) + 8 * ord(" ") != _number(header[148:156]):
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
        raise ValueError(f"number {quote(field)} is out of range")
    return value


def _extend(extended: _Extended, kind: bytes, data: bytes) -> None:
    """Reads a GNU long name or the `path` and `size` of a pax header."""
    if kind == b"L":
        extended.name = decode(data.rstrip(b"\0"))
        return
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 10)
        length = data[position:space] if space > 0 else b""
        end = position + (int(length) if length.isdigit() else 0)
        if space < 0 or not space < end <= len(data):
            raise ValueError("damaged pax header")
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            extended.name = decode(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise ValueError("damaged pax header")
            extended.size = int(value)
        position = end
