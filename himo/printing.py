"""What leaves himo for a terminal or a spreadsheet: text that is shown, and nothing that is obeyed.

Names, paths, captions and keys come from files that anyone may have written, and they end up in
tables, errors, tracebacks and progress bars. So they are made harmless where all of it passes, not
where each is printed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from himo.errors import printable

# A cell that begins with one of these is a formula to a spreadsheet, which may run programs.
_FORMULA = tuple("=+-@＝＋－＠\t\r\n")


class PrintableStream:
    """A text stream that escapes what a terminal would obey: see `printable`.

    Line breaks pass. What the encoding of the stream has no bytes for is escaped, too.

    Args:
        stream: where the text goes. All but writing is left to it.
        bars: lets a carriage return begin a write, as progress bars do to go back in their line.
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
    """What is printed inside goes through a `PrintableStream`."""
    with open(os.devnull, "w") as nowhere:  # for a stream that is closed, as with `>&-`
        out: Any = PrintableStream(sys.stdout or nowhere)
        err: Any = PrintableStream(sys.stderr or nowhere, bars=True)
        with redirect_stdout(out), redirect_stderr(err):
            yield


def csv_cell(text: str) -> str:
    """A text as a cell of a csv file: printable, after a quote mark if it would be a formula."""
    return f"'{printable(text)}" if text.startswith(_FORMULA) else printable(text)
