"""csv and tsv files: a header, then one image path and caption on each row."""

import os
import re
from collections import deque
from collections.abc import Iterator, Set
from typing import Any

from himo.data.folder import IMAGE_SUFFIXES
from himo.data.records import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    MAX_RECORD,
    SHORT_CAPTION_KEY,
    BadRecord,
    KeyedSource,
    Progress,
    Record,
    RecordError,
    lines,
    make_record,
    pick,
)
from himo.errors import HimoError, quoted
from himo.files import open_regular

_SEPARATORS = ("\t", ",", ";")
_QUOTED = re.compile(r'([^"]*+(?:""[^"]*+)*+)("?)')  # up to the quote that closes it, if there
# Numbers, and the hexadecimal ones of a digest or a UUID.
_NUMBER = re.compile(r"[0-9a-fA-F]{4,}|\d+")
# Longest row, in lines. If its quote was a stray one, each line is read again.
_MAX_LINES = 500
# Lines read again, plus ten times the lines of the file so far. In a file with more of them, which
# is full of stray quotes, no row continues on further lines.
_MAX_AGAIN, _MAX_AGAIN_SHARE = 10_000, 10
_MAX_SHAPES = 1000  # of image paths


class Table(KeyedSource):
    """A table with a column of image paths and one of captions, as open_clip reads.

    Fields may be quoted with `"`, and a quoted field may span several lines. A row with more or
    fewer fields than the header is bad: most often a caption has an unquoted separator.

    A quote that is never closed costs only its own row: the quoted field ends, and its row is bad,
    where the next line reads as a row of its own, with an image path in its place.

    Args:
        path: the file.
        separator: one character; None takes the tab, or the comma or semicolon if only that
            gives the columns.
        image_key: name of the column of paths; None takes `filepath`, `image` or `img_path`, in
            upper or lower case.
        caption_key: name of the column of captions; None takes `title` or `caption`, in any case.
            A column `caption_short` is read where there is one.
    """

    kind = "csv"

    def __init__(
        self,
        path: str | os.PathLike[str],
        separator: str | None = None,
        image_key: str | None = None,
        caption_key: str | None = None,
    ) -> None:
        super().__init__(path, image_key, caption_key)
        # A quote as separator would never be found.
        if separator is not None and (len(separator) != 1 or separator in '"\r\n\0'):
            raise HimoError(f"separator: expected one character such as ',', got {separator!r}")
        self.separator = separator

    def options(self) -> dict[str, Any]:
        return {"separator": self.separator, **super().options()}

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        with open_regular(self.path) as file:
            source = _Lines(lines(self.path, file, progress))
            separator, header = self._header(next(source, (1, ""))[1])
            names = self._names(header)
            for name in names:
                if header.count(name) > 1:
                    raise HimoError(f"{self.path}:1: two columns are named {quoted(name)}")
            names += [SHORT_CAPTION_KEY] if SHORT_CAPTION_KEY in header else []
            columns = [header.index(name) for name in names]
            rows = _Rows(source, separator, len(header), columns[0])
            for number, line in source:
                try:
                    if line is None:
                        message = f"line is longer than {MAX_RECORD:,} bytes"
                        raise RecordError("too_long", message)
                    if line.strip("\r\n"):
                        row = rows.read(number, line)
                        record = make_record(number, *(row[column] for column in columns))
                        rows.learn(record.image)
                        yield record
                except RecordError as error:
                    yield error.at(f"{self.path}:{number}")

    def _header(self, line: str | None) -> tuple[str, list[str]]:
        if line is None:
            raise HimoError(f"{self.path}:1: header is longer than {MAX_RECORD:,} bytes")
        problem, most = None, -1
        for separator in [self.separator] if self.separator else _SEPARATORS:
            header: list[str] = []
            try:
                header = _fields(line, separator, 1, iter(()))
                self._names(header)
            except RecordError as error:
                if len(header) > most:  # the message is about the likeliest separator
                    problem, most = error, len(header)
            else:
                return separator, header
        given = f"separator {self.separator!r}" if self.separator else "tab, comma or semicolon"
        raise HimoError(f"{self.path}:1: header split at {given}: {problem}")

    def _names(self, header: list[str]) -> list[str]:
        """The columns of the image and of the caption; RecordError if one is not there."""
        return [
            pick(header, self.image_key, IMAGE_KEYS, "column"),
            pick(header, self.caption_key, CAPTION_KEYS, "column"),
        ]


class _Lines(Iterator[tuple[int, str | None]]):
    """Numbered lines that can be put back."""

    def __init__(self, source: Iterator[tuple[int, str | None]]) -> None:
        self._source = source
        self._ahead: deque[tuple[int, str | None]] = deque()

    def __next__(self) -> tuple[int, str | None]:
        return self._ahead.popleft() if self._ahead else next(self._source)

    def put_back(self, taken: list[tuple[int, str | None]]) -> None:
        self._ahead.extendleft(reversed(taken))


class _Rows:
    """Rows of a table, and what tells a row from a line of a quoted field.

    Args:
        source: the lines after the one that `read` is given.
        separator: of fields.
        width: fields of a row.
        image: the position of the image path among them.
    """

    def __init__(self, source: _Lines, separator: str, width: int, image: int) -> None:
        self.source, self.separator, self.width, self.image = source, separator, width, image
        self._shapes = set(IMAGE_SUFFIXES)
        self._again = 0  # lines put back so far

    def learn(self, image: str) -> None:
        """Learns from the path of a good record what image paths look like."""
        if len(self._shapes) < _MAX_SHAPES:
            self._shapes.add(_shape(image))

    def read(self, number: int, line: str) -> list[str]:
        """The `width` fields of the row that begins with `line`.

        Raises:
            RecordError: there are more or fewer fields, or a quote is wrong. The lines below that
                may be rows of their own are then put back.
        """
        taken: list[tuple[int, str | None]] = []
        known = self._shapes
        before_quotes = line.partition('"')[0].split(self.separator)
        if len(before_quotes) > self.image + 1:
            known = known | {_shape(before_quotes[self.image])}
        try:
            row = _fields(line, self.separator, self.width, self._below(line, known, taken))
        except RecordError:
            self._put_back(line, known, taken)
            raise
        if len(row) != self.width:
            last = number + len(taken)
            over = f"over lines {number} to {last}: is a quote not closed? " if taken else ""
            message = f"{len(row)} fields, the header has {self.width}: {over}{quoted(row[0])}"
            raise RecordError("fields", message)
        return row

    def _below(
        self, line: str, known: Set[str], taken: list[tuple[int, str | None]]
    ) -> Iterator[str]:
        """The lines after `line` that may belong to its row; `taken` gets them and the next."""
        rows, size = int(self._is_row(line, known)), len(line)
        for number, below in self.source:
            taken.append((number, below))
            if self._again > _MAX_AGAIN + _MAX_AGAIN_SHARE * number:
                return
            if below is None or len(taken) > _MAX_LINES or (size := size + len(below)) > MAX_RECORD:
                return
            rows += self._is_row(below, known)
            if rows > 1:
                return
            yield below

    def _put_back(self, line: str, known: Set[str], taken: list[tuple[int, str | None]]) -> None:
        """Puts back the lines that do not belong to the row that is lost.

        To it belong the lines up to the first with an image path, or the first line alone if
        every row begins with its path. So do those after them that cannot begin a row: they have
        one field, and no quote at their start.
        """
        texts = [line, *(below or "" for _, below in taken)] if self.image else []
        first = next((at for at, text in enumerate(texts) if self._is_row(text, known)), 0)
        self.source.put_back(taken[first:])
        self._again += len(taken)
        for at, below in self.source:
            if below is None or self.separator in below or below.startswith('"'):
                self.source.put_back([(at, below)])
                break

    def _is_row(self, line: str, known: Set[str]) -> bool:
        """Whether a line, split without regard to quotes, has an image path in its place.

        known: the shapes of such paths.
        """
        fields = line.split(self.separator)
        # Counted from the end too, because a caption may hold a separator.
        places = {self.image, self.image - self.width + len(fields)}
        return len(fields) > 1 and any(
            _shape(fields[place].strip('" \r\n')) in known
            for place in places
            if 0 <= place < len(fields)
        )


def _shape(path: str) -> str:
    """What the image paths of a data set have in common: the suffix, or else all but numbers."""
    return os.path.splitext(path)[1].lower() or _NUMBER.sub("0", path)


def _fields(line: str, separator: str, width: int, below: Iterator[str]) -> list[str]:
    """The fields of a row, as Python's csv reads them in its strict mode.

    Args:
        line: its first line.
        separator: of fields.
        width: fields after this many do not continue on further lines.
        below: the lines on which a quoted field may continue.

    Raises:
        RecordError: a quote is not closed, or something follows the one that closes a field.
    """
    fields: list[str] = []
    position = 0
    while True:
        if line.startswith('"', position):
            parts: list[str] = []
            match = _QUOTED.match(line, position + 1)
            while match is not None and not match[2]:
                parts.append(match[1])
                line = next(below, "") if len(fields) < width else ""
                if not line:
                    raise RecordError("syntax", f"a quote is not closed: {quoted(''.join(parts))}")
                match = _QUOTED.match(line)
            assert match is not None  # it matches any text
            parts.append(match[1])
            fields.append("".join(parts).replace('""', '"'))
            position = match.end()
        else:
            end = line.find(separator, position)
            end = end if end >= 0 else len(line.rstrip("\r\n"))
            fields.append(line[position:end])
            position = end
        if line.startswith(separator, position):
            position += 1
        elif line[position:].strip("\r\n"):
            message = f"{quoted(separator)} expected after a closing quote, got "
            raise RecordError("syntax", message + quoted(line[position:]))
        else:
            return fields
