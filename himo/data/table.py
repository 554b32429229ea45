"""csv and tsv files: a header, then one image path and caption on each row."""

import csv
import os
from collections.abc import Iterator
from typing import Any

from himo.data.records import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    MAX_RECORD,
    SHORT_CAPTION_KEY,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    lines,
    make_record,
    pick,
    quote,
)
from himo.errors import HimoError
from himo.files import open_regular

_SEPARATORS = ("\t", ",", ";")


class Table(Source):
    """A table with a column of image paths and one of captions, as open_clip reads.

    Fields may be quoted with `"`, and a quoted field may go on over several lines. A row with
    more or fewer fields than the header is bad: most often an unquoted separator in a caption.

    Args:
        path: the file.
        separator: one character; None takes the tab, or the comma or semicolon if only that
            gives the columns.
        image_key: name of the column of paths; None takes `filepath`, `image` or `img_path`.
        caption_key: name of the column of captions; None takes `title` or `caption`.
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
        super().__init__(path)
        # csv takes a quote as separator and then never finds one.
        if separator is not None and (len(separator) != 1 or separator in '"\r\n\0'):
            raise HimoError(f"separator: expected one character such as ',', got {separator!r}")
        self.separator, self.image_key, self.caption_key = separator, image_key, caption_key

    def options(self) -> dict[str, Any]:
        return {
            "separator": self.separator,
            "image_key": self.image_key,
            "caption_key": self.caption_key,
        }

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        with open_regular(self.path) as file:
            source = lines(self.path, file, progress)
            separator, header = self._header(next(source, (1, ""))[1])
            image = pick(header, self.image_key, IMAGE_KEYS, "column")
            caption = pick(header, self.caption_key, CAPTION_KEYS, "column")
            for column in (image, caption):
                if header.count(column) > 1:
                    raise HimoError(f"{self.path}:1: two columns are named {quote(column)}")
            columns = [header.index(image), header.index(caption)]
            if SHORT_CAPTION_KEY in header:
                columns.append(header.index(SHORT_CAPTION_KEY))
            first = last = 0  # lines on which the record begins and ends
            too_long: list[BadRecord] = []

            def rows() -> Iterator[str]:
                nonlocal first, last
                for number, line in source:
                    first, last = first or number, number
                    if line is not None:
                        yield line
                    else:
                        first = 0
                        error = RecordError("too_long", f"line is longer than {MAX_RECORD:,} bytes")
                        too_long.append(error.at(f"{self.path}:{number}"))

            # Strict, because otherwise a quote that is never closed swallows rows without a word.
            reader = csv.reader(rows(), delimiter=separator, strict=True)
            row: list[str] | None = []
            while row is not None:
                first = 0
                item: Record | BadRecord | None = None
                try:
                    row = next(reader, None)
                    if row:  # not an empty line
                        item = self._record(first, last, row, columns, len(header))
                except csv.Error as error:
                    item = RecordError("syntax", str(error)).at(f"{self.path}:{first}")
                except RecordError as error:
                    item = error.at(f"{self.path}:{first}")
                yield from too_long
                too_long.clear()
                if item is not None:
                    yield item

    def _header(self, line: str | None) -> tuple[str, list[str]]:
        if line is None:
            raise HimoError(f"{self.path}:1: header is longer than {MAX_RECORD:,} bytes")
        problem, most = None, -1
        for separator in [self.separator] if self.separator else _SEPARATORS:
            header: list[str] = []
            try:
                header = next(csv.reader([line], delimiter=separator, strict=True), [])
                pick(header, self.image_key, IMAGE_KEYS, "column")
                pick(header, self.caption_key, CAPTION_KEYS, "column")
            except (csv.Error, RecordError) as error:
                if len(header) > most:  # what is said is of the likeliest separator
                    problem, most = error, len(header)
            else:
                return separator, header
        given = f"separator {self.separator!r}" if self.separator else "tab, comma or semicolon"
        raise HimoError(f"{self.path}:1: header split at {given}: {problem}")

    @staticmethod
    def _record(first: int, last: int, row: list[str], columns: list[int], width: int) -> Record:
        if len(row) != width:
            over = f"over lines {first} to {last}: is a quote not closed? " if last > first else ""
            message = f"{len(row)} fields, the header has {width}: {over}{quote(row[0])}"
            raise RecordError("fields", message)
        return make_record(first, *(row[column] for column in columns))
