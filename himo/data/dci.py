"""DCI's annotations as they are downloaded: a folder with a JSON file for each image."""

import hashlib
import os
from collections.abc import Iterator

from himo.data.records import (
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    json_error,
    list_directory,
    make_record,
)
from himo.errors import HimoError, quoted
from himo.files import json_value, open_regular

_MAX_FILE = 64 << 20  # bytes of one annotation, most of them masks


class Annotations(Source):
    """The pairs of Long-DCI: `image` and `extra_caption` of each `*.json`, by sorted names.

    A file whose `extra_caption` is empty is no record: it counts in `ignored`.

    Args:
        path: the folder `annotations`; by default images are in the folder `photos` next to it.
    """

    kind = "dci"
    unit = " files"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.image_root = os.path.join(os.path.dirname(os.path.abspath(self.path)), "photos")
        self._names = sorted(
            name for name in list_directory(self.path) if name.lower().endswith(".json")
        )
        if not self._names:
            raise HimoError(f"{self.path}: expected DCI's annotations, NAME.json for each image")

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            status = os.stat(os.path.join(self.path, name), follow_symlinks=False)
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def size(self) -> int:
        return len(self._names)

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        empty = 0
        for number, name in enumerate(self._names, start=1):
            path = os.path.join(self.path, name)
            try:
                record = _record(path)
            except RecordError as error:
                yield error.at(path)
            else:
                empty += record is None
                if record is not None:
                    yield record
            if number % 1000 == 0:
                progress(number)
        self.ignored = {"files without an extra_caption": empty}


def _record(path: str) -> Record | None:
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_FILE + 1)
    except HimoError as error:
        raise RecordError("not_a_file", str(error)) from error
    if len(data) > _MAX_FILE:
        raise RecordError("too_long", f"is longer than {_MAX_FILE:,} bytes")
    try:
        value = json_value(data)
    except ValueError as error:
        raise json_error(error) from error
    if not isinstance(value, dict) or not {"image", "extra_caption"} <= value.keys():
        raise RecordError("missing_key", f"{quoted(value)} has no image and extra_caption")
    caption = value["extra_caption"]
    if isinstance(caption, str) and not caption.strip():
        return None
    return make_record(0, value["image"], caption)
