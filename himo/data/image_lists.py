"""Files that list several captions for each image: COCO's, Karpathy's and Flickr30k's."""

import os
import re
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
    check_start,
    decode,
    json_error,
    lines,
    make_record,
)
from himo.data.splits import Splits
from himo.errors import HimoError, quoted
from himo.files import open_regular

_MAX_FILE = 512 << 20  # bytes, read whole; Karpathy's file of COCO has 144 million
# How such a file begins; no record of one object for each line does.
IMAGE_LIST = re.compile(
    rb'\{\s*"(?:(?:images|annotations|licenses|categories)"\s*:\s*\[|info"\s*:\s*\{|dataset"\s*:)'
)
FLICKR_LINE = re.compile(rb"[^\t\r\n]+#\d+\t")


class ImageList(Source):
    """One JSON object with a list `images`, in one of two forms.

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
        with open_regular(self.path) as file:
            data = file.read(_MAX_FILE + 1)
        if len(data) > _MAX_FILE:
            raise HimoError(f"{self.path}: is longer than {_MAX_FILE:,} bytes")
        try:
            value = DECODER.decode(decode(data[check_start(self.path, data) :]))
        except (ValueError, RecursionError) as error:
            raise HimoError(f"{self.path}: {json_error(error)}") from error
        progress(len(data))
        images = value.get("images") if isinstance(value, dict) else None
        if not isinstance(images, list):
            raise HimoError(f"{self.path}: expected an object with a list of images")
        captions = self._annotations(value) if "annotations" in value else None
        splits = Splits(self.split)
        for number, image in enumerate(images, start=1):
            try:
                if not isinstance(image, dict):
                    raise RecordError("type", f"image is {quoted(image)}, expected an object")
                if not splits.takes(image.get("split")):
                    continue
                name, texts = _sentences(image) if captions is None else _coco(image, captions)
            except RecordError as error:
                yield error.at(f"{self.path}: image {number}")
                continue
            for text in texts:
                try:
                    yield make_record(0, name, text)
                except RecordError as error:
                    yield error.at(f"{self.path}: image {number}")
        self.splits = splits.counts
        splits.check(self.path)

    def _annotations(self, value: dict[str, Any]) -> dict[Any, list[Any]]:
        """The captions of each image by its id, in the order of the file."""
        if not isinstance(value["annotations"], list):
            raise HimoError(f"{self.path}: expected a list of annotations")
        captions: dict[Any, list[Any]] = {}
        for annotation in value["annotations"]:
            owner = annotation.get("image_id") if isinstance(annotation, dict) else None
            if not isinstance(owner, int | str) or "caption" not in annotation:
                raise HimoError(
                    f"{self.path}: expected annotations with image_id and caption, got "
                    f"{quoted(annotation)}"
                )
            captions.setdefault(owner, []).append(annotation["caption"])
        return captions


def _coco(image: dict[str, Any], captions: dict[Any, list[Any]]) -> tuple[Any, list[Any]]:
    """The path and the captions of one of COCO's images."""
    owner = image.get("id")
    found = captions.get(owner) if isinstance(owner, int | str) else None
    if found is None or "file_name" not in image:
        raise RecordError("missing_key", f"image {quoted(owner)} has no file_name or no caption")
    return image["file_name"], found


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
