"""The token cache: the ids of every caption of an index, encoded once and read row by row.

Encoding 1.25 million captions takes a core half a minute, in every epoch. The cache takes their ids
in uint16, before they are cut or padded, so that it serves every context length. It lies next to
the index, `NAME.himo-index` and `NAME.himo-tokens`, and is written whole or not at all.

It is trusted no more than the data: its header has to name the captions and the tokenizer that are
in use, and a row that is damaged or holds an unknown id is encoded again from its caption. Its
header and checksums are described in `himo.data.blob_file`. Its body, little-endian:

    ids        of each row: caption, then short caption, uint16, without start and end
    rows       one `_ROW` for each row of the index
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from himo.data.blob_file import BlobFile, DamagedFile, Frame
from himo.data.index import SampleIndex
from himo.data.workers import in_order
from himo.errors import HimoError, note
from himo.files import remove_abandoned
from himo.progress import source_bar
from himo.tokenizer import (
    END_OF_TEXT,
    TextError,
    default_tokenizer,
    padded_row,
    report_truncation,
    tokenizer_digest,
)

_FRAME = Frame(b"HIMOTOK1", b"TOK1", "a token cache")
# Offset of the ids; number of the caption's and of the short caption's; CRC-32 of the ids and of
# the earlier fields, which begins with the number of the row.
_ROW = struct.Struct("<qiiI")
_CRC = struct.Struct("<I")
_UNREADABLE, _NONE = -1, -2  # instead of a number: the tokenizer refuses the text; there is none
_MOST_IDS = 1 << 16  # of one row: two captions of MAX_CAPTION characters, four bytes each
_CHUNK = 2048  # rows that a worker encodes at a time


class TokenCache:
    """The ids of the captions of an index, for one context length.

    It can be pickled and forked: worker processes read the same file.

    Args:
        path: a file that `open_tokens` has written.
        key: identifies captions and tokenizer.
        records: rows of the index.
        context_length: tokens of a row that is read.

    Raises:
        DamagedFile: there is no such file, it is damaged, or of other captions or another
            tokenizer.
    """

    def __init__(self, path: str, key: str, records: int, context_length: int) -> None:
        self.path, self.key, self.records = path, key, records
        self.context_length = context_length
        self._file = BlobFile(path, _FRAME)
        if self._file.header != {"key": key, "records": records}:
            raise self._file.damaged("is of other captions or of another tokenizer")
        self._rows = self._file.body_end - records * _ROW.size
        if self._rows < len(_FRAME.magic):
            raise self._file.damaged("has a damaged header")

    def tokens(self, row: int, short: bool = False) -> Tensor | None:
        """The tokens of a row as `himo.tokenize` gives them, int32 [L].

        With `short`, of the short caption where there is one. None where the caption has to be
        encoded again: the tokenizer refuses it, or the cache is damaged there.
        """
        ids = self._ids(row, short)
        if ids is None:
            return None
        if len(ids) > 2 * (self.context_length - 2):
            report_truncation([(0, len(ids) // 2 + 2)], 1, self.context_length, True)
        padded = numpy.frombuffer(padded_row(ids, self.context_length), dtype="<u2")
        return torch.from_numpy(padded.astype(numpy.int32))

    def lengths(self) -> numpy.ndarray:
        """Ids of each caption and of its short caption, int32 [records, 2], negative for none."""
        kinds = numpy.dtype([("offset", "<i8"), ("ids", "<i4", 2), ("crc", "<u4")])
        data = self._file.read(self._rows, self.records * _ROW.size)
        return numpy.frombuffer(data, dtype=kinds)["ids"].copy()

    def _ids(self, row: int, short: bool) -> bytes | None:
        with suppress(DamagedFile):
            data = self._file.read(self._rows + _ROW.size * row, _ROW.size)
            offset, *counts, crc = _ROW.unpack(data)
            numbers = [max(0, count) for count in counts]
            end = offset + 2 * sum(numbers)
            if not (0 <= sum(numbers) <= _MOST_IDS and len(_FRAME.magic) <= offset <= end):
                return None
            ids = self._file.read(offset, end - offset) if end <= self._rows else b""
            if len(ids) != end - offset or _checksum(row, ids, data) != crc:
                return None
            if len(ids) and numpy.frombuffer(ids, dtype="<u2").max() > END_OF_TEXT:
                return None
            if short and counts[1] != _NONE:
                return ids[2 * numbers[0] :] if counts[1] >= 0 else None
            return ids[: 2 * numbers[0]] if counts[0] >= 0 else None
        return None

    def __getstate__(self) -> tuple[str, str, int, int]:
        return self.path, self.key, self.records, self.context_length

    def __setstate__(self, state: tuple[str, str, int, int]) -> None:
        TokenCache.__init__(self, *state)


def _checksum(row: int, ids: bytes, data: bytes) -> int:
    return zlib.crc32(data[: -_CRC.size], zlib.crc32(ids, row & 0xFFFFFFFF))


def open_tokens(
    index: SampleIndex, context_length: int, *, workers: int = 0, progress: bool = True
) -> TokenCache | None:
    """The token cache of an index, from its file or written now; all its rows are encoded.

    None, with a note, where it cannot be written: the captions are then encoded when they are read.

    Args:
        index: the samples; a selection has the cache of its whole file.
        context_length: tokens of a row that is read.
        workers: processes that encode; 0 encodes in this one.
        progress: shows a bar after 2 seconds.
    """
    path = f"{index.path.removesuffix('.himo-index')}.himo-tokens"
    sources = (index.report.sha256, tokenizer_digest())
    key = hashlib.sha256("\0".join(sources).encode()).hexdigest()
    given = (path, key, index.report.records, context_length)
    with suppress(DamagedFile):
        return TokenCache(*given)
    try:
        remove_abandoned(os.path.dirname(path))  # of a process that was killed here
        _write(path, index, key, workers, progress)
        return TokenCache(*given)
    except HimoError as error:
        note(f"captions are encoded whenever they are read: {error}")
        return None


def _write(path: str, index: SampleIndex, key: str, workers: int, progress: bool) -> None:
    chunks = _Chunks(index)
    rows = bytearray()
    offset = len(_FRAME.magic)
    source, total = index.report.source, index.report.records
    bar = source_bar("tokens", source, total, " captions", shown=progress)
    with bar, _FRAME.create(path) as file:
        for encoded in in_order(chunks, workers if len(chunks) > 1 else 0):
            for ids, *counts in encoded:
                number = len(rows) // _ROW.size
                row = _ROW.pack(offset, *counts, 0)
                rows += row[: -_CRC.size] + _CRC.pack(_checksum(number, ids, row))
                file.write(ids)
                offset += len(ids)
            bar.update(len(encoded))
        file.write(rows)
        _FRAME.finish(file, offset + len(rows), {"key": key, "records": total})


class _Chunks(Dataset[list[tuple[bytes, int, int]]]):
    """For each chunk of rows of an index file the ids, and how many both captions have."""

    def __init__(self, index: SampleIndex) -> None:
        self.index = index.whole()

    def __len__(self) -> int:
        return (len(self.index) + _CHUNK - 1) // _CHUNK

    def __getitem__(self, chunk: int) -> list[tuple[bytes, int, int]]:
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk} of {len(self)}")
        return list(self._rows(range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.index)))))

    def _rows(self, rows: range) -> Iterator[tuple[bytes, int, int]]:
        for row in rows:
            record = self.index[row]
            ids, count = _encoded(record.caption)
            more, short = _encoded(record.caption_short) if record.caption_short else (b"", _NONE)
            yield ids + more, count, short


def _encoded(text: str) -> tuple[bytes, int]:
    """The ids of a text and their number."""
    try:
        ids = default_tokenizer().encode_bytes(text)
    except TextError:
        return b"", _UNREADABLE
    return ids, len(ids) // 2
