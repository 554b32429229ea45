"""ShareGPT4V annotations: one JSON list of records, never held in memory as a whole.

The full file is 1.39 GB and takes 2.6 GB once decoded; here one record is decoded at a time.
"""

import codecs
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from himo.data.records import (
    DECODER,
    MAX_RECORD,
    ObjectSource,
    Progress,
    RecordError,
    check_start,
    json_error,
)
from himo.errors import HimoError, quoted

_CHUNK = 1 << 18  # bytes read at a time
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space; Unicode has more
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["{}\[\]]', re.DOTALL)
_FIRST_KEY = re.compile(r'{\s*("[^"\\\n]{0,100}")\s*:')
_NEXT_OBJECT = re.compile(rf",\s*{_FIRST_KEY.pattern}")
_SCALAR_END = re.compile(r"[,\]\s]")
_MAX_KEYS = 100  # that records begin with


class ShareGPT4V(ObjectSource):
    """Records `{"image": path, "conversations": [{...}, {"from": "gpt", "value": caption}]}`.

    The caption is the text of the assistant's first turn, with line breaks as spaces: in ShareGPT4V
    the second turn, which HiMo-CLIP and Long-CLIP train on. A turn is found by its role
    (`from` or `role`: gpt, assistant, ...); its text is its `value` or `content`. A record without
    conversations, as in other JSON lists of captioned images, is read by its caption key.

    Args:
        path: the file.
        image_key: key of the path; None takes `filepath`, `image` or `img_path`.
        caption_key: key of the caption, instead of the conversations; None takes `title` or
            `caption` in a record without conversations.
    """

    kind = "sharegpt4v"

    def values(self, file: BufferedReader, progress: Progress) -> Iterator[tuple[int, Any]]:
        """Yields the line and the value of each element of the JSON list in `file`.

        An element that is not JSON but whose end can be found yields a RecordError as its value;
        HimoError where the rest of the file cannot be read.
        """
        text = JsonText(self.path, file, progress)
        if text.skip_space() != "[":
            raise text.error(f"expected a JSON list of records, got {quoted(text.peek(20))}")
        yield from text.elements()
        if text.skip_space():
            raise text.error(f"expected nothing after the list, got {quoted(text.peek(20))}")

    def place(self, line: int, number: int) -> str:
        return f"{super().place(line, number)}: record {number}"


class JsonText:
    """A window on the text of a file that moves forward and counts lines."""

    def __init__(self, path: str, file: BufferedReader, progress: Progress) -> None:
        self.path, self.file, self.progress = path, file, progress
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        start = file.read(_CHUNK)
        self.read = len(start)
        self.ended = not start
        self.window = self.decoder.decode(start[check_start(path, start) :])
        self.position = 0  # in the window
        self.line = 1  # of the position
        self._first_keys: set[str] = set()  # of good records

    def error(self, message: str) -> HimoError:
        return HimoError(f"{self.path}:{self.line}: {message}")

    def move(self, position: int) -> None:
        self.line += self.window.count("\n", self.position, position)
        self.position = position

    def peek(self, length: int) -> str:
        return self.window[self.position : self.position + length]

    def fill(self) -> None:
        """Reads on, at least as much as is left, so that a long record takes few attempts."""
        rest = len(self.window) - self.position
        data = self.file.read(max(_CHUNK, rest))
        self.read += len(data)
        self.ended = not data
        self.window = self.window[self.position :] + self.decoder.decode(data, final=self.ended)
        self.position = 0
        self.progress(self.read)

    def skip_space(self) -> str:
        """Moves to the next character that is not a space and returns it; "" at the end."""
        while True:
            end = _SPACE.match(self.window, self.position).end()  # type: ignore[union-attr]
            self.move(end)
            if end < len(self.window) or self.ended:
                return self.window[end : end + 1]
            self.fill()

    def elements(self) -> Iterator[tuple[int, Any]]:
        """Yields the line and the value of each element of the list at the position, as `element`.

        The list is then behind the position.
        """
        self.move(self.position + 1)
        separator = self.skip_space()
        if separator == "]":
            self.move(self.position + 1)
        while separator != "]":
            line = self.line
            yield line, self.element()
            separator = self.skip_space()
            if separator not in {",", "]"}:
                came = quoted(self.peek(20)) if separator else "the end of the file"
                raise self.error(f"expected , or ] after a record, got {came}")
            self.move(self.position + 1)
            self.skip_space()

    def element(self) -> Any:
        """Decodes the element at the position and moves past it; a RecordError if not JSON."""
        if self.peek(1) in {",", "]", "}"}:
            raise self.error(f"expected a record, got {self.peek(1)!r}: is a comma left over?")
        while True:
            value: Any
            try:
                value, end = DECODER.raw_decode(self.window, self.position)
            except (ValueError, RecursionError) as error:
                value, end = json_error(error), self._end()
            else:
                opening = _FIRST_KEY.match(self.window, self.position)
                if opening is not None and len(self._first_keys) < _MAX_KEYS:
                    self._first_keys.add(opening[1])
            # A number at the end of the window may continue behind it.
            if 0 <= end < len(self.window) or (self.ended and end > 0):
                if end - self.position > MAX_RECORD:
                    value = RecordError("too_long", f"record is longer than {MAX_RECORD:,} bytes")
                self.move(end)
                return value
            if len(self.window) - self.position > MAX_RECORD:
                raise self.error(f"a record begins that has no end within {MAX_RECORD:,} bytes")
            if self.ended:
                raise self.error("the file ends in the middle of a record: is it complete?")
            self.fill()

    def _end(self) -> int:
        """Where the broken element at the position ends; -1 if not in the window.

        It ends where its brackets close. A stray quote would move that end past good records.
        Therefore it ends at the latest before the next object whose first key is its own first key
        or a good record's.
        """
        opening = _FIRST_KEY.match(self.window, self.position)
        if opening is None:
            return self._closing_bracket(len(self.window))
        start = opening.end()
        reach = 1 << 10  # grows, so that the time is linear in the distance to the nearer end
        while True:
            limit = min(start + reach, len(self.window))
            end = self._closing_bracket(limit)
            for match in _NEXT_OBJECT.finditer(self.window, start, end if end >= 0 else limit):
                if match[1] == opening[1] or match[1] in self._first_keys:
                    return match.start()
            if end >= 0 or limit == len(self.window):
                return end
            reach *= 4

    def _closing_bracket(self, limit: int) -> int:
        """Where the brackets and quotes of the element are closed; -1 if not before `limit`."""
        first = self.peek(1)
        if first not in {"{", "[", '"'}:
            match = _SCALAR_END.search(self.window, self.position, limit)
            return match.start() if match and match.start() > self.position else -1
        depth = 0
        for match in _STRING_OR_BRACKET.finditer(self.window, self.position, limit):
            token = match[0]
            if token in {"{", "["}:
                depth += 1
            elif token in {"}", "]"}:
                depth -= 1
            elif token == '"':
                return -1  # a string that does not end
            if depth == 0:
                return match.end()
        return -1
