"""Escapes text for a terminal or a spreadsheet, so that neither obeys it.

Names, paths, captions and keys come from untrusted files and end up in tables, errors, tracebacks
and progress bars. So the output streams escape them, not each print.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from himo.errors import printable

# A spreadsheet takes a cell that begins with one of these for a formula, which may run programs.
_FORMULA = tuple("=+-@＝＋－＠\t\r\n")


class PrintableStream:
    """A text stream that escapes terminal controls with `printable`, except line breaks.

    Characters that the encoding of the stream lacks are escaped, too.

    Args:
        stream: receives the text and every call but writing.
        bars: lets a write begin with a carriage return, with which progress bars redraw their line.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False) -> None:
        self._stream, self._bars = stream, bars

    def write(self, text: str) -> int:
        """Writes a text; returns its length, as the stream does."""
        start = "\r" if self._bars and text.startswith("\r") else ""
        lines = text[len(start) :].split("\n")
        shown = start + "\n".join(line if line.isprintable() else printable(line) for line in lines)
        if not shown.isascii():
            encoding = self._stream.encoding or "utf-8"
            shown = shown.encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each of several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Sends what the body prints through a `PrintableStream`."""
    with open(os.devnull, "w") as nowhere:  # for a stream that is closed, as with `>&-`
        out: Any = PrintableStream(sys.stdout or nowhere)
        err: Any = PrintableStream(sys.stderr or nowhere, bars=True)
        with redirect_stdout(out), redirect_stderr(err):
            yield


def csv_cell(text: str) -> str:
    """A text as a csv cell: printable, and after a quote mark if it would be a formula."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)
