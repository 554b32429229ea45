"""A folder of images, each with its caption in a text file of the same name."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any

from himo.data.paths import ImageRoot
from himo.data.records import (
    MAX_RECORD,
    BadRecord,
    Progress,
    Record,
    RecordError,
    Source,
    check_start,
    decode,
    make_record,
    quote,
)
from himo.errors import HimoError
from himo.files import open_regular

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"]
)
_LAYOUTS = (("image", "caption"), ("images", "captions"))


class Folder(Source):
    """Images and captions as `<name>.jpg` and `<name>.txt`, in one of two layouts.

    With subfolders `image` and `caption` (Urban1k; or `images` and `captions`), the names below
    each are paired; else the two files stand side by side, at any depth. The order is that of the
    sorted names. Hidden files are not looked at; what has no partner and any other file is counted
    in `ignored`. The text file is the caption; its lines are joined by spaces.

    Args:
        path: the folder.
        first_line: takes the first line of each text file alone, as the protocol of Urban1k does.
        follow_links: see `ImageRoot`; also for the text files.
    """

    kind = "folder"
    unit = " files"

    def __init__(
        self,
        path: str | os.PathLike[str],
        first_line: bool = False,
        follow_links: bool = False,
    ) -> None:
        super().__init__(path)
        self.first_line = first_line
        self.root = ImageRoot(path, follow_links)
        self._pairs: list[tuple[str, str]] | None = None

    @property
    def image_root(self) -> str | None:
        return self.path

    def options(self) -> dict[str, Any]:
        return {"first_line": self.first_line}

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for image, text in self._scan():
            status = os.stat(os.path.join(self.path, text), follow_symlinks=False)
            line = f"{image}\0{text}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def size(self) -> int:
        return len(self._scan())

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        for number, (image, text) in enumerate(self._scan(), start=1):
            try:
                yield make_record(0, image, self._caption(text))
            except RecordError as error:
                yield error.at(os.path.join(self.path, text))
            if number % 1000 == 0:
                progress(number)

    def _caption(self, text: str) -> str:
        with open_regular(self.root.resolve(text)) as file:
            data = file.read(MAX_RECORD + 1)
        if len(data) > MAX_RECORD:
            raise RecordError("too_long", f"caption file is longer than {MAX_RECORD:,} bytes")
        caption = decode(data[check_start(text, data) :])
        if self.first_line:
            caption = caption.split("\n", 1)[0]
        return " ".join(caption.split("\n"))

    def _scan(self) -> list[tuple[str, str]]:
        """Relative paths of each image and its text file, sorted."""
        if self._pairs is not None:
            return self._pairs
        layout = next((x for x in _LAYOUTS if all(self._has(name) for name in x)), ("", ""))
        images: dict[str, list[str]] = {}
        texts: dict[str, str] = {}
        others = 0
        for directory, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            relative = os.path.relpath(directory, self.path)
            for name in names:
                path = name if relative == "." else f"{relative}/{name}"
                stem, suffix = os.path.splitext(path)
                if name.startswith("."):
                    continue
                if suffix.lower() in IMAGE_SUFFIXES and _below(path, layout[0]):
                    images.setdefault(stem[len(layout[0]) :], []).append(path)
                elif suffix.lower() == ".txt" and _below(path, layout[1]):
                    texts[stem[len(layout[1]) :]] = path
                else:
                    others += 1
        for stem, paths in images.items():
            if len(paths) > 1 and stem in texts:
                both = " and ".join(map(quote, sorted(paths)[:2]))
                raise HimoError(f"{self.path}: {both} share the caption {quote(texts[stem])}")
        self.ignored = {
            "images without a caption": sum(len(x) for s, x in images.items() if s not in texts),
            "captions without an image": len(texts.keys() - images.keys()),
            "other files": others,
        }
        self._pairs = sorted(
            (images[stem][0], texts[stem]) for stem in images.keys() & texts.keys()
        )
        return self._pairs

    def _has(self, name: str) -> bool:
        return os.path.isdir(os.path.join(self.path, name))


def _below(path: str, directory: str) -> bool:
    return not directory or path.startswith(f"{directory}/")
