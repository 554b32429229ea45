"""Tar shards as webdataset writes them: `{key}.jpg` next to `{key}.txt` or `{key}.json`.

The index is made from the headers and the captions alone; an image is then one read at its byte
offset.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from himo.data.folder import IMAGE_SUFFIXES
from himo.data.records import (
    DECODER,
    MAX_IMAGE,
    MAX_RECORD,
    SHORT_CAPTION_KEY,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    caption_of_mapping,
    decode_file,
    json_error,
    list_directory,
    make_record,
    regular_file,
)
from himo.data.tar import Member, members
from himo.errors import HimoError, quoted
from himo.files import open_regular

# As in webdataset, the key ends at the first dot of the base name. A file without a key (a hidden
# one, or one without a dot) belongs to no sample, and does not end the sample around it.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")
_SHARD = re.compile(r"\.(tar(\.(gz|bz2|xz|zst|lz4|lzma|Z|br))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_IMAGE_ORDER = ("jpg", "png", "jpeg", "webp")
_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_MAX_SHARDS = 1_000_000
_SHORT_KEY = f'"{SHORT_CAPTION_KEY}"'.encode()


class WebDataset(Source):
    """Tar shards; the files of a sample are adjacent and share the name up to its first dot.

    In a sample, `a.jpg` goes with `a.txt` or `a.json`, or else with the only other caption, such as
    `a.cap.txt`; and `a.v2.jpg` goes with `a.v2.txt`. Of an image in several formats the first of
    jpg, png, jpeg and webp is taken, as open_clip does. Other files of a sample are counted in
    `ignored`. A file that comes twice begins a new sample, and so does the next of several joined
    archives.

    Args:
        path: an uncompressed shard, a directory of `*.tar`, or a numbered pattern such as
            `cc-{0000..0331}.tar`.
        caption_key: key of the caption in `{key}.json`; None takes `{key}.txt`, or else the key
            `title` or `caption`. The json may also hold a `caption_short`.
    """

    kind = "webdataset"

    def __init__(self, path: str | os.PathLike[str], caption_key: str | None = None) -> None:
        super().__init__(path)
        self.caption_key, self.image_root = caption_key, None
        self.shards = [os.path.abspath(shard) for shard in _expand(self.path)]

    def options(self) -> dict[str, Any]:
        return {"caption_key": self.caption_key}

    def stamp(self) -> str:
        states = [(shard, regular_file(shard)) for shard in self.shards]
        text = repr([(shard, state.st_size, state.st_mtime_ns) for shard, state in states])
        return hashlib.sha256(text.encode()).hexdigest()

    def size(self) -> int:
        return sum(regular_file(shard).st_size for shard in self.shards)

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        done = 0
        self.ignored = {"other files": 0}
        for number, shard in enumerate(self.shards):
            with open_regular(shard) as file:
                sample = _Sample(number, file.fileno())
                try:
                    for member in members(shard, file.fileno()):
                        match = _NAME.fullmatch(member.name)
                        if match is None or _META.match(member.name):
                            self.ignored["other files"] += 1
                            continue
                        place, suffix = (member.archive, match[1]), match[2].lower()
                        if sample.place != place or suffix in sample.files:
                            yield from self._records(sample)
                            sample = _Sample(number, file.fileno(), place)
                            progress(done + member.offset)
                        if _kind(suffix) is None:
                            sample.others += 1
                        else:
                            sample.files[suffix] = member
                except RecordError as error:
                    yield error.at(shard)
                yield from self._records(sample)
                done += os.fstat(file.fileno()).st_size

    def _records(self, sample: "_Sample") -> Iterator[Record | BadRecord]:
        """The records of one key: each image with its caption, or a bad record."""
        if not sample.files:
            if sample.others < 2:  # a file by itself is no sample
                self.ignored["other files"] += sample.others
            else:
                yield BadRecord(
                    "missing_key",
                    f"{self.shards[sample.shard]}: {quoted(sample.place[1])} has {sample.others} "
                    "files, but no image and no .txt or .json",
                )
            return
        self.ignored["other files"] += sample.others
        parts = sample.parts()
        images = [part for part in parts.values() if part.images]
        captions = [part for part in parts.values() if part.captions]
        # As a.cap.txt of a.jpg. An image of another name may be a mask: it is not guessed.
        if len(images) == len(captions) == 1 and images[0] is parts.get(""):
            parts = {"": _Part(images[0].images, captions[0].captions)}
        for name, part in parts.items():
            if _is_beside_another(name, parts) and not (part.images and part.captions):
                self.ignored["other files"] += len(part.images) + len(part.captions)
            else:
                yield self._record(sample, part)
                self.ignored["other files"] += max(0, len(part.images) - 1)

    def _record(self, sample: "_Sample", part: "_Part") -> Record | BadRecord:
        name = next(iter([*part.images.values(), *part.captions.values()])).name
        try:
            if not part.images:
                raise RecordError("missing_key", f"{quoted(name)} has no image beside it")
            image = part.image()
            if image.size > MAX_IMAGE:
                raise RecordError("too_long", f"image is longer than {MAX_IMAGE:,} bytes")
            caption = self._caption(sample.descriptor, part)
            short = self._caption_short(sample.descriptor, part)
            record = make_record(0, _readable(image).name, caption, short)
            return replace(record, shard=sample.shard, offset=image.offset, size=image.size)
        except RecordError as error:
            return error.at(f"{self.shards[sample.shard]}: {quoted(name)}")

    def _caption(self, descriptor: int, part: "_Part") -> Any:
        if not part.captions:
            raise RecordError("missing_key", "image has no .txt or .json beside it")
        first = "json" if self.caption_key is not None else "txt"
        kind = first if first in part.captions else next(iter(part.captions))
        member = _readable(part.captions[kind])
        if member.size > MAX_RECORD:
            raise RecordError("too_long", f".{kind} is longer than {MAX_RECORD:,} bytes")
        text = decode_file(os.pread(descriptor, member.size, member.offset))
        if kind == "txt":
            return text
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise json_error(error) from error
        return caption_of_mapping(value, self.caption_key)

    def _caption_short(self, descriptor: int, part: "_Part") -> Any:
        """The short caption that `himo pack` writes, in the json, or None."""
        member = part.captions.get("json")
        if member is None or not member.is_file or member.size > MAX_RECORD:
            return None
        data = os.pread(descriptor, member.size, member.offset)
        if _SHORT_KEY not in data:  # of most shards: they need not be decoded
            return None
        try:
            value = DECODER.decode(decode_file(data))
        except (ValueError, RecursionError, RecordError):
            return None  # the caption is in the .txt, or the error is already known
        short = value.get(SHORT_CAPTION_KEY) if isinstance(value, dict) else None
        return short if isinstance(short, str) else None


def _readable(member: Member) -> Member:
    if not member.is_file:
        raise RecordError("not_a_file", f"{quoted(member.name)} is a link in the archive")
    return member


@dataclass
class _Part:
    """The files of a sample that differ only in the last suffix, by that suffix."""

    images: dict[str, Member] = field(default_factory=dict)
    captions: dict[str, Member] = field(default_factory=dict)

    def image(self) -> Member:
        """The image that open_clip takes where there are several."""
        order = (*_IMAGE_ORDER, *self.images)
        return self.images[next(suffix for suffix in order if suffix in self.images)]


@dataclass
class _Sample:
    """Adjacent members of one key: image and caption files by suffix."""

    shard: int
    descriptor: int
    place: tuple[int, str] = (-1, "")  # archive and key
    files: dict[str, Member] = field(default_factory=dict)
    others: int = 0

    def parts(self) -> dict[str, _Part]:
        """The files by the name between the key and the last suffix: "" in `a.jpg`."""
        parts: dict[str, _Part] = {}
        for suffix, member in self.files.items():
            name, _, last = suffix.rpartition(".")
            part = parts.setdefault(name, _Part())
            (part.images if _kind(suffix) == "image" else part.captions)[last] = member
        return parts


def _is_beside_another(name: str, parts: dict[str, _Part]) -> bool:
    """Whether the files of a part belong to another: `a.mask.png` to `a.jpg`."""
    words = name.split(".", 16) if name else []
    return any(".".join(words[:end]) in parts for end in range(len(words)))


def _kind(suffix: str) -> str | None:
    last = suffix.rpartition(".")[2]
    if f".{last}" in IMAGE_SUFFIXES:
        return "image"
    return "caption" if last in ("txt", "json") else None


def is_shard(name: str) -> bool:
    """Whether a file of this name is opened as a shard; a compressed one is refused by name."""
    return not name.startswith(".") and _SHARD.search(name) is not None


def _expand(path: str) -> list[str]:
    """The shards that `path` names; HimoError if there are none or one is missing."""
    if _RANGE.search(path) is None and os.path.isdir(path):
        names = sorted(filter(is_shard, list_directory(path)))
        if not names:
            raise HimoError(f"{path}: expected a directory with .tar shards, found none")
        return [os.path.join(path, name) for name in names]
    ranges = list(_RANGE.finditer(path))
    count = 1
    for given in ranges:  # before any name is made: a million of them take 370 MiB
        count *= max(0, int(given[2]) - int(given[1]) + 1)
        if not 0 < count <= _MAX_SHARDS:
            raise HimoError(f"{path}: expected a range such as {{0000..0331}}, got {given[0]}")
    paths = [path]
    for given in ranges:
        numbers = range(int(given[1]), int(given[2]) + 1)
        names = [f"{number:0{len(given[1])}}" for number in numbers]
        paths = [_RANGE.sub(name, x, count=1) for x in paths for name in names]
    missing = [shard for shard in paths if not os.path.exists(shard)]
    if missing:
        raise HimoError(f"{path}: {len(missing)} of {len(paths)} shards missing: {missing[0]}")
    return paths
