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
    decode_file,
    make_record,
)
from himo.errors import HimoError, quoted
from himo.files import open_regular, os_reason

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"])
IMAGE_SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
_LAYOUTS = (("image", "caption"), ("images", "captions"))


class Folder(Source):
    """Images and captions as `<name>.jpg` and `<name>.txt`, in one of two layouts.

    With subfolders `image` and `caption` (Urban1k; or `images` and `captions`), the names below
    each are paired; otherwise the two files lie next to each other, at any depth. Records are in
    the order of the sorted names. An image without a caption and a caption without an image are bad
    records. Hidden files are skipped; other files and folders behind a link count in `ignored`. The
    text file is the caption; its lines are joined by spaces.

    Args:
        path: the folder.
        first_line: takes only the first line of each text file, as Urban1k's protocol does.
        follow_links: see `ImageRoot`; also for the text files.
    """

    kind = "folder"
    unit = " files"

    def __init__(
        self, path: str | os.PathLike[str], first_line: bool = False, follow_links: bool = False
    ) -> None:
        super().__init__(path)
        self.first_line, self.image_root = first_line, self.path
        self.root = ImageRoot(path, follow_links)
        self._files: list[tuple[str, str]] | None = None

    def options(self) -> dict[str, Any]:
        return {"first_line": self.first_line}

    def stamp(self) -> str:
        digest = hashlib.sha256()
        for image, text in self._scan():
            try:
                status = os.stat(os.path.join(self.path, text or image), follow_symlinks=False)
            except OSError:  # removed since the folder was listed: `read` counts it
                continue
            line = f"{image}\0{text}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def size(self) -> int:
        return len(self._scan())

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        for number, (image, text) in enumerate(self._scan(), start=1):
            try:
                if not (image and text):
                    what = "image" if text else "caption"
                    raise RecordError("missing_key", f"has no {what} of the same name")
                yield make_record(0, image, self._caption(text))
            except RecordError as error:
                yield error.at(os.path.join(self.path, text or image))
            if number % 1000 == 0:
                progress(number)

    def _caption(self, text: str) -> str:
        try:
            with open_regular(self.root.resolve(text)) as file:
                data = file.read(MAX_RECORD + 1)
        except HimoError as error:
            raise RecordError("not_a_file", str(error)) from error
        if len(data) > MAX_RECORD:
            raise RecordError("too_long", f"caption file is longer than {MAX_RECORD:,} bytes")
        caption = decode_file(data)
        if self.first_line:
            caption = caption.partition("\n")[0]
        return caption.replace("\n", " ")

    def _scan(self) -> list[tuple[str, str]]:
        """Relative paths of each image and its text file, sorted; "" for one that is missing."""
        if self._files is not None:
            return self._files
        layout = next((names for names in _LAYOUTS if all(map(self._has, names))), ("", ""))
        images: dict[str, list[str]] = {}
        texts: dict[str, list[str]] = {}
        self.ignored = {"other files": 0, "folders behind a link": 0}
        for path in self._walk():
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in IMAGE_SUFFIXES and _below(path, layout[0]):
                images.setdefault(stem[len(layout[0]) :], []).append(path)
            elif suffix.lower() == ".txt" and _below(path, layout[1]):
                texts.setdefault(stem[len(layout[1]) :], []).append(path)
            else:
                self.ignored["other files"] += 1
        if images and not texts:
            count = sum(map(len, images.values()))
            raise HimoError(
                f"{self.path}: {count:,} images and no captions: expected a text file NAME.txt for "
                "each image NAME.jpg, or in place of the folder a csv of image paths and captions"
            )
        for stem in sorted(images.keys() & texts.keys()):
            for several, one in ((images[stem], texts[stem]), (texts[stem], images[stem])):
                if len(several) > 1:
                    both = " and ".join(map(quoted, sorted(several)[:2]))
                    what = "caption" if several is images[stem] else "image"
                    raise HimoError(f"{self.path}: {both} share the {what} {quoted(one[0])}")
        found = [(images[stem][0], texts[stem][0]) for stem in images.keys() & texts.keys()]
        found += [(path, "") for stem in images.keys() - texts.keys() for path in images[stem]]
        found += [("", path) for stem in texts.keys() - images.keys() for path in texts[stem]]
        self._files = sorted(found, key=lambda pair: pair[0] or pair[1])
        return self._files

    def _walk(self) -> Iterator[str]:
        """The paths of all files, relative to the folder; counts the folders behind links."""

        def failed(error: OSError) -> None:
            raise HimoError(f"{error.filename}: cannot be listed: {os_reason(error)}") from error

        for directory, folders, names in os.walk(self.path, onerror=failed):
            folders[:] = [name for name in folders if not name.startswith(".")]
            links = [name for name in folders if os.path.islink(os.path.join(directory, name))]
            self.ignored["folders behind a link"] += len(links)
            relative = os.path.relpath(directory, self.path)
            for name in names:
                if not name.startswith("."):
                    yield name if relative == "." else f"{relative}/{name}"

    def _has(self, name: str) -> bool:
        return os.path.isdir(os.path.join(self.path, name))


def _below(path: str, directory: str) -> bool:
    return not directory or path.startswith(f"{directory}/")
