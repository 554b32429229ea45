"""JSON lines: one object with an image path and a caption on each line."""

import re
from collections.abc import Iterator
from typing import Any

from himo.data.records import (
    DECODER,
    MAX_RECORD,
    BadRecord,
    KeyedSource,
    Progress,
    Record,
    RecordError,
    json_error,
    lines,
    record_of_mapping,
)
from himo.files import open_regular

# Between objects. Files that were joined have a byte order mark, or no line break, in between.
_SPACE = re.compile("[ \t\n\r\ufeff]*")
# Where an object ends and another begins. In JSON only a string can hold the like.
_NEXT_OBJECT = re.compile('(?<=})[ \t\ufeff]*(?={[ \t]*")')


class JsonLines(KeyedSource):
    """Objects such as `{"image": "a.jpg", "caption": "A red door."}`, one on each line.

    The image key is `filepath`, `image` or `img_path` and the caption key `title` or `caption`,
    whichever is there first, unless named; a conversation is read as in `ShareGPT4V`.
    `caption_short` is optional. Empty lines are skipped, and a line may hold several objects.
    """

    kind = "jsonl"

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        with open_regular(self.path) as file:
            for number, line in lines(self.path, file, progress):
                for value in _values(line):
                    try:
                        if isinstance(value, RecordError):
                            raise value
                        yield record_of_mapping(value, number, self.image_key, self.caption_key)
                    except RecordError as error:
                        yield error.at(f"{self.path}:{number}")


def _values(line: str | None) -> Iterator[Any]:
    """The JSON values on a line; a RecordError for what is none, to the next object."""
    if line is None:
        yield RecordError("too_long", f"line is longer than {MAX_RECORD:,} bytes")
        return
    position = _SPACE.match(line).end()  # type: ignore[union-attr]
    while position < len(line):
        try:
            value, position = DECODER.raw_decode(line, position)
        except (ValueError, RecursionError) as error:
            yield json_error(error)
            # Each by itself, for what the decoder raises has read all of its text before.
            for following in _NEXT_OBJECT.split(line[position:])[1:]:
                yield from _values(following)
            return
        yield value
        position = _SPACE.match(line, position).end()  # type: ignore[union-attr]
