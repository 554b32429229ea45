"""JSON lines: one object with an image path and a caption on each line."""

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
    json_error,
    lines,
)

# Between objects. Where files were joined there is a byte order mark, or no line break.
_SPACE = re.compile("[ \t\n\r\ufeff]*")
# Where an object ends and the next begins. In valid JSON only a string can hold this.
_NEXT_OBJECT = re.compile('(?<=})[ \t\ufeff]*(?={[ \t]*")')


class JsonLines(ObjectSource):
    """Objects such as `{"image": "a.jpg", "caption": "A red door."}`, one on each line.

    By default the image key is the first of `filepath`, `image` and `img_path` that is there, and
    the caption key the first of `title` and `caption`; a conversation is read as in `ShareGPT4V`.
    `caption_short` is optional. Empty lines are skipped, and a line may hold several objects.
    """

    kind = "jsonl"

    def values(self, file: BufferedReader, progress: Progress) -> Iterator[tuple[int, Any]]:
        for number, line in lines(self.path, file, progress):
            for value in _values(line):
                yield number, value


def _values(line: str | None) -> Iterator[Any]:
    """The JSON values on a line; a RecordError for the text up to the next object if not JSON."""
    if line is None:
        yield RecordError("too_long", f"line is longer than {MAX_RECORD:,} bytes")
        return
    position = _SPACE.match(line).end()  # type: ignore[union-attr]
    while position < len(line):
        try:
            value, position = DECODER.raw_decode(line, position)
        except (ValueError, RecursionError) as error:
            yield json_error(error)
            # Each by itself: a decoding error costs time linear in the whole text it is given.
            for following in _NEXT_OBJECT.split(line[position:])[1:]:
                yield from _values(following)
            return
        yield value
        position = _SPACE.match(line, position).end()  # type: ignore[union-attr]
