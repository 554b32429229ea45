"""The sample index: a data set's records in one file, built once and read row by row.

Parsing 1.25 million records takes seconds and gigabytes in every process; the index opens in
milliseconds, and all processes share the system's copy of its pages. A library's format would bring
a large dependency, and would trust the file more than this one does.

The file is trusted no more than the data, so it does not say where images are. Its header and
checksums are described in `himo.data.blob_file`. Its body, little-endian:

    text       of each row: image path, caption, short caption, UTF-8, one after the other
    rows       one `_ROW` for each sample
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy
from PIL import Image

from himo.data.blob_file import BlobFile, DamagedFile, Frame
from himo.data.index_report import IndexReport
from himo.data.paths import ImageRoot, MissingImage
from himo.data.records import (
    MAX_CAPTION,
    MAX_IMAGE,
    MAX_RECORD,
    BadRecord,
    Record,
    RecordError,
    Source,
    make_record,
)
from himo.errors import HimoError, printable
from himo.files import os_reason
from himo.progress import source_bar
from himo.transforms import ImageError, Reason, open_image

_FRAME = Frame(b"HIMOIDX2", b"IDX1", "an index")
# Offset of the text; bytes of path, caption and short caption; line; shard, offset and size of the
# image in it; CRC-32 of the text and of the row's earlier fields.
_ROW = struct.Struct("<qiiiqiqqI")
_SHORT = slice(16, 20)  # the bytes of the third of these lengths
_AT_ONCE = 1 << 20  # rows; a read of a file returns at most 2 GiB
_CRC = struct.Struct("<I")
_MAX_TEXT = 4 * (MAX_RECORD + 2 * MAX_CAPTION)  # bytes of the text of one row
_OPEN_SHARDS = 64  # descriptors that stay open in each process, of the usual limit of 1024


@dataclass(frozen=True)
class Origin:
    """The data set of an index. It comes from the caller, never from the index file.

    Attributes:
        source: path of the data set, for messages.
        kind: its format, for messages.
        root: where its images are; None if `shards` hold them.
        shards: paths of the tar files.
    """

    source: str
    kind: str
    root: ImageRoot | None = None
    shards: Sequence[str] = ()


def write_index(
    path: str | os.PathLike[str],
    source: Source,
    root: ImageRoot | None,
    *,
    key: str,
    skip_missing_images: bool,
    max_bad_fraction: float,
    progress: bool,
) -> None:
    """Reads all of `source` and writes its index to `path`, whole or not at all.

    Args:
        path: the index file.
        source: the data set.
        root: where its images are; None if the source holds them itself.
        key: identifies source and options; `SampleIndex.is_current` compares it.
        skip_missing_images: leaves out records whose image does not exist, instead of an error.
        max_bad_fraction: the largest fraction of the records that may be bad.
        progress: shows a bar after 2 seconds.

    Raises:
        HimoError: as `IndexReport.check` and `check_missing`; a source that is not of its format.
    """
    report = IndexReport(source.path, source.kind)
    stamp = source.stamp()
    digest = hashlib.sha256()
    rows = bytearray()
    offset = len(_FRAME.magic)
    bar = source_bar("index", source.path, source.size(), source.unit, shown=progress)
    with bar, _FRAME.create(path) as file:
        for item in source.read(lambda done: bar.update(done - bar.n)):
            if isinstance(item, BadRecord):
                report.add_bad(item.reason, item.message)
                continue
            if root is not None and not _has_image(root, item, source.path, report):
                continue
            fields = [part.encode() for part in (item.image, item.caption, item.caption_short)]
            text = b"".join(fields)
            place = (item.line, item.shard, item.offset, item.size)
            row = _ROW.pack(offset, *map(len, fields), *place, 0)[: -_CRC.size]
            rows += row + _CRC.pack(zlib.crc32(row, zlib.crc32(text)))
            file.write(text)
            offset += len(text)
            digest.update(b"\0".join(fields) + b"\n")
            report.records += 1
        report.ignored, report.splits = source.ignored, source.splits
        report.sha256 = digest.hexdigest()
        report.check(max_bad_fraction)
        if not skip_missing_images:
            report.check_missing()
        values = {"key": key, "stamp": stamp, "rows": offset, "report": report.to_dict()}
        file.write(rows)
        _FRAME.finish(file, offset + len(rows), values)


def _has_image(root: ImageRoot, record: Record, source: str, report: IndexReport) -> bool:
    is_there = True
    try:
        root.resolve(record.image)
    except MissingImage:
        is_there = False
    except RecordError as error:
        place = f"{source}:{record.line}" if record.line else source
        report.add_bad(error.reason, f"{place}: {error}")
        return False
    report.add_image(root.relative(record.image), not is_there)
    return is_there


class SampleIndex(Sequence[Record]):
    """The records of a data set, read from an index file on demand.

    It can be pickled and forked: worker processes read the same file.

    Args:
        path: a file that `write_index` has written.
        origin: its data set; None gives the captions, but no image.

    Raises:
        DamagedFile: there is no index, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str], origin: Origin | None = None) -> None:
        self.path = os.path.abspath(path)
        self.origin = origin
        self._descriptors: dict[int, int] = {}  # of shards
        self._selected: numpy.ndarray | None = None
        self._file = BlobFile(self.path, _FRAME)
        try:
            self._read_header(self._file.header, self._file.body_end)
        except ValueError as error:
            raise self._damaged("has a damaged header") from error

    def _read_header(self, header: Any, end: int) -> None:
        """Takes the values of a decoded header at offset `end`; ValueError if one is wrong."""
        if not isinstance(header, dict) or header.keys() != {"key", "stamp", "rows", "report"}:
            raise ValueError("other keys")
        self.key, self.stamp, self._rows = header["key"], header["stamp"], header["rows"]
        origin = self.origin or Origin(self.path, "index")
        self.report = IndexReport.from_dict(origin.source, origin.kind, header["report"])
        size = self.report.records * _ROW.size
        if type(self._rows) is not int or not len(_FRAME.magic) <= self._rows == end - size:
            raise ValueError("rows")

    def is_current(self, key: str, stamp: str) -> bool:
        """Whether the source is the same and unchanged, and the missing images are still missing.

        Only the missing images that the report names as examples are looked for.
        """
        root = self.origin.root if self.origin else None
        if root is not None:
            for image in self.report.missing_examples:
                with suppress(RecordError):
                    root.resolve(image)
                    return False
        return (self.key, self.stamp) == (key, stamp)

    def select(self, rows: Iterable[int]) -> "SampleIndex":
        """The samples at these positions, as an index of their own over the same file.

        `select(range(1000))` holds out the pairs that ShareGPT4V's users validate on.
        """
        chosen = numpy.asarray(list(rows), dtype=numpy.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            got = f"{chosen.min()} to {chosen.max()}"
            raise HimoError(f"select: expected rows from 0 to {len(self) - 1}, got {got}")
        selected = copy(self)
        selected._selected = chosen if self._selected is None else self._selected[chosen]
        return selected

    def whole(self) -> "SampleIndex":
        """All samples of the file, including those left out by `select`."""
        return SampleIndex(self.path, self.origin) if self._selected is not None else self

    def __len__(self) -> int:
        return self.report.records if self._selected is None else len(self._selected)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "SampleIndex": ...
    def __getitem__(self, index: int | slice) -> "Record | SampleIndex":
        """The record at `index`; for a slice, `select`."""
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        record = self._record(self.row(index))
        if record is None:
            raise self._damaged(f"is damaged at sample {index}")
        return record

    def short_captions(self) -> int:
        """How many of the samples have a `caption_short`."""
        rows = self.report.records
        found = numpy.empty(rows, dtype=bool)
        for begin in range(0, rows, _AT_ONCE):
            end = min(begin + _AT_ONCE, rows)
            data = self._file.read(self._rows + _ROW.size * begin, _ROW.size * (end - begin))
            fields = numpy.frombuffer(data, dtype=numpy.uint8).reshape(-1, _ROW.size)
            found[begin:end] = fields[:, _SHORT].any(axis=1)
        return int((found if self._selected is None else found[self._selected]).sum())

    def row(self, index: int) -> int:
        """The row of the index file that holds the sample at `index`."""
        row = index % len(self)
        return row if self._selected is None else int(self._selected[row])

    def _record(self, row: int) -> Record | None:
        """The record in a row of the file; None if the row or its text is damaged."""
        data = self._file.read(self._rows + _ROW.size * row, _ROW.size)
        start, *lengths, line, shard, offset, size, crc = _ROW.unpack(data)
        end = start + sum(lengths)
        most = min(self._rows, start + _MAX_TEXT)
        if min(lengths) < 0 or not len(_FRAME.magic) <= start <= end <= most:
            return None
        text = self._file.read(start, end - start)
        if zlib.crc32(data[: -_CRC.size], zlib.crc32(text)) != crc:
            return None
        image, caption = lengths[0], lengths[0] + lengths[1]
        fields = text[:image], text[image:caption], text[caption:]
        if shard < -1 or offset < 0 or not 0 <= size <= MAX_IMAGE:
            return None
        try:
            record = make_record(line, *(field.decode() for field in fields))
        except (UnicodeDecodeError, RecordError):
            return None
        return replace(record, shard=shard, offset=offset, size=size)

    def image_source(self, index: int) -> str | bytes:
        """The path of an image, checked to be inside the image root, or its bytes from a shard.

        Raises:
            ImageError: it is missing, not a regular file, or cut off.
            HimoError: the index was opened without its data set.
        """
        record = self[index]
        if self.origin is None:
            raise HimoError(f"{self.path}: was opened without its data set, so it has no images")
        if self.origin.root is None:
            return self._read_shard(record, self.origin.shards)
        try:
            return self.origin.root.resolve(record.image)
        except RecordError as error:
            reason: Reason = "missing" if isinstance(error, MissingImage) else "not_a_file"
            raise ImageError(str(error), reason) from error

    def open_image(self, index: int) -> Image.Image:
        """The decoded image; ImageError as `image_source` and `himo.transforms.open_image`."""
        return open_image(self.image_source(index))

    def describe(self, index: int) -> str:
        """Where the record is, for a message: file, line and image."""
        record = self[index]
        line = f":{record.line}" if record.line else ""
        return printable(f"{self.report.source}{line}: {record.image}")

    def _read_shard(self, record: Record, shards: Sequence[str]) -> bytes:
        if not 0 <= record.shard < len(shards):
            raise self._damaged(f"has an image in shard {record.shard} of {len(shards)}")
        shard = shards[record.shard]
        try:
            if record.shard not in self._descriptors:
                if len(self._descriptors) >= _OPEN_SHARDS:
                    os.close(self._descriptors.pop(next(iter(self._descriptors))))
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                self._descriptors[record.shard] = os.open(shard, flags)
            data = os.pread(self._descriptors[record.shard], record.size, record.offset)
        except OSError as error:
            raise ImageError(f"{shard}: {os_reason(error)}", "missing") from error
        if len(data) < record.size:
            raise ImageError(f"{shard}: {record.image} is cut off", "truncated")
        return data

    def _damaged(self, what: str) -> DamagedFile:
        return self._file.damaged(what)

    def _check_same(self, sha256: str) -> None:
        if self.report.sha256 != sha256:
            raise HimoError(f"{self.path}: the data set was indexed anew while it was in use")

    def __getstate__(self) -> tuple[str, Origin | None, str, numpy.ndarray | None]:
        return self.path, self.origin, self.report.sha256, self._selected

    def __setstate__(self, state: tuple[str, Origin | None, str, numpy.ndarray | None]) -> None:
        path, origin, sha256, selected = state
        SampleIndex.__init__(self, path, origin)
        self._check_same(sha256)
        self._selected = selected

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
