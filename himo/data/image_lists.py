"""Files that list several captions for each image: COCO's, Karpathy's and Flickr30k's."""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from himo.data.records import (
    MAX_RECORD,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    lines,
    make_record,
)
from himo.data.sharegpt4v import JsonText
from himo.data.splits import Splits
from himo.errors import quoted
from himo.files import open_regular

# How such a file begins; no record of one object for each line does.
IMAGE_LIST = re.compile(
    rb'\{\s*"(?:(?:images|annotations|licenses|categories)"\s*:\s*\[|info"\s*:\s*\{|dataset"\s*:)'
)
FLICKR_LINE = re.compile(rb"[^\t\r\n]+#\d+\t")


class ImageList(Source):
    """One JSON object with a list `images`, in one of two forms, never held in memory as a whole.

    COCO's `captions_*.json` has `images[{"id", "file_name"}]` and `annotations[{"image_id",
    "caption"}]`. Karpathy's `dataset_*.json` has `images[{"filepath", "filename", "split",
    "sentences": [{"raw"}]}]`, where `filepath`, a folder, and `split` may be missing. Records are
    in the order of the images, the captions of one in the order of the file.

    Args:
        path: the file.
        split: reads the images of this split alone.
    """

    kind = "image-list"

    def __init__(self, path: str | os.PathLike[str], split: str | None = None) -> None:
        super().__init__(path)
        self.split = split

    def options(self) -> dict[str, Any]:
        return {"split": self.split}

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        splits = Splits(self.split)
        images: dict[Any, tuple[int, Any]] = {}  # COCO's by id: line and path
        captions: dict[Any, list[Any]] = {}  # by id of the image
        with open_regular(self.path) as file:
            for line, key, value in self._members(JsonText(self.path, file, progress)):
                try:
                    if isinstance(value, RecordError):
                        raise value
                    if not isinstance(value, dict):
                        raise RecordError("type", f"{key}: expected objects, got {quoted(value)}")
                    if key == "annotations":
                        owner = _id(value, "image_id")
                        captions.setdefault(owner, []).append(value.get("caption"))
                    elif splits.takes(value.get("split")):
                        if "sentences" not in value:
                            images[_id(value, "id")] = line, value.get("file_name")
                            continue
                        yield from self._records(line, *_sentences(value))
                except RecordError as error:
                    yield error.at(f"{self.path}:{line}")
        for owner, (line, name) in images.items():
            yield from self._records(line, name, captions.get(owner, [None]))
        self.splits = splits.counts
        splits.check(self.path)

    def _members(self, text: JsonText) -> Iterator[tuple[int, str, Any]]:
        """Yields the line, the list and the value of each image and annotation."""
        if text.skip_space() != "{":
            raise text.error(f"expected an object with a list of images, got {text.peek(20)!r}")
        found = False
        while text.skip_space() != "}":
            text.move(text.position + 1)  # the brace, or a comma
            text.skip_space()
            key = text.element()
            if text.skip_space() != ":":
                raise text.error(f"expected : after a key, got {quoted(text.peek(20))}")
            text.move(text.position + 1)
            if text.skip_space() == "[" and key in ("images", "annotations"):
                found = found or key == "images"
                for line, value in text.elements():
                    yield line, key, value
            else:
                text.element()
            if text.skip_space() not in {",", "}"}:
                raise text.error(f"expected , or }} after a value, got {quoted(text.peek(20))}")
        if not found:
            raise text.error("expected an object with a list of images")

    def _records(
        self, line: int, name: Any, captions: Iterable[Any]
    ) -> Iterator[Record | BadRecord]:
        for caption in captions:
            try:
                yield make_record(line, name, caption)
            except RecordError as error:
                yield error.at(f"{self.path}:{line}")


def _id(value: dict[str, Any], key: str) -> int | str:
    number = value.get(key)
    if not isinstance(number, int | str):
        raise RecordError("missing_key", f"{key} is {quoted(number)}, expected a number")
    return number


def _sentences(image: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The path and the captions of one of Karpathy's images."""
    name, folder, sentences = (image.get(key) for key in ("filename", "filepath", "sentences"))
    if not isinstance(sentences, list) or not sentences:
        raise RecordError("missing_key", f"image {quoted(name)} has no sentences")
    if isinstance(name, str) and isinstance(folder, str) and folder:
        name = f"{folder}/{name}"
    return name, [text.get("raw") if isinstance(text, dict) else text for text in sentences]


class FlickrLines(Source):
    """Flickr30k's lines `name.jpg#k<tab>caption`, as in `results_20130124.token`; k = 0, 1, ...

    Args:
        path: the file.
    """

    kind = "flickr"

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        with open_regular(self.path) as file:
            for number, line in lines(self.path, file, progress):
                try:
                    if line is None:
                        message = f"line is longer than {MAX_RECORD:,} bytes"
                        raise RecordError("too_long", message)
                    if not line.strip():
                        continue
                    first, tab, caption = line.partition("\t")
                    name, mark, position = first.rpartition("#")
                    if not (tab and mark and position.isdecimal()):
                        message = f"expected name#number<tab>caption, got {quoted(line.strip())}"
                        raise RecordError("syntax", message)
                    yield make_record(number, name, caption.rstrip("\r\n"))
                except RecordError as error:
                    yield error.at(f"{self.path}:{number}")
