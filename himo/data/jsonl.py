"""JSON lines: one object with an image path and a caption on each line."""

import os
from collections.abc import Iterator
from typing import Any

from himo.data.records import (
    DECODER,
    MAX_RECORD,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    json_error,
    lines,
    record_of_mapping,
)
from himo.files import open_regular


class JsonLines(Source):
    """Objects such as `{"image": "a.jpg", "caption": "A red door."}`, one on each line.

    The image key is `filepath`, `image` or `img_path` and the caption key `title` or `caption`,
    whichever is there first, unless named. `caption_short` is optional. Empty lines are skipped.
    """

    kind = "jsonl"

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_key: str | None = None,
        caption_key: str | None = None,
    ) -> None:
        super().__init__(path)
        self.image_key, self.caption_key = image_key, caption_key

    def options(self) -> dict[str, Any]:
        return {"image_key": self.image_key, "caption_key": self.caption_key}

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        with open_regular(self.path) as file:
            for number, line in lines(self.path, file, progress):
                if line is not None and (not line or line.isspace()):
                    continue
                try:
                    yield self._record(number, line)
                except RecordError as error:
                    yield error.at(f"{self.path}:{number}")

    def _record(self, number: int, line: str | None) -> Record:
        if line is None:
            raise RecordError("too_long", f"line is longer than {MAX_RECORD:,} bytes")
        try:
            value = DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise json_error(error) from error
        return record_of_mapping(value, number, self.image_key, self.caption_key)
