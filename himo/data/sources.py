"""Opens a data set of any known format, and builds its index if there is none."""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from himo.data.dci import Annotations
from himo.data.folder import Folder
from himo.data.image_lists import FLICKR_LINE, IMAGE_LIST, FlickrLines, ImageList
from himo.data.index import Origin, SampleIndex, write_index
from himo.data.jsonl import JsonLines
from himo.data.paths import ImageRoot
from himo.data.records import START, Source, check_uncompressed, list_directory, regular_file
from himo.data.sharegpt4v import ShareGPT4V
from himo.data.table import Table
from himo.data.webdataset import WebDataset, is_shard
from himo.errors import HimoError
from himo.files import open_regular, os_reason

# By --dataset-type: the class, and the options that it takes.
_KEYS = ("image_key", "caption_key")
_OBJECTS = (*_KEYS, "split")
_FORMATS: dict[str, tuple[Callable[..., Source], tuple[str, ...]]] = {
    "sharegpt4v": (ShareGPT4V, _OBJECTS),
    "csv": (Table, ("separator", *_KEYS)),
    "jsonl": (JsonLines, _OBJECTS),
    "image-list": (ImageList, ("split",)),
    "flickr": (FlickrLines, ()),
    "dci": (Annotations, ()),
    "folder": (Folder, ("first_line", "follow_links")),
    "webdataset": (WebDataset, ("caption_key",)),
}
DATASET_TYPES = ("auto", *_FORMATS)

_SUFFIXES = dict.fromkeys([".csv", ".tsv"], "csv")
_SUFFIXES |= dict.fromkeys([".jsonl", ".jsonlines", ".ndjson"], "jsonl")
_SUFFIXES |= {".token": "flickr"}


def open_dataset(
    source: str | os.PathLike[str],
    dataset_type: str = "auto",
    *,
    image_root: str | os.PathLike[str] | None = None,
    image_key: str | None = None,
    caption_key: str | None = None,
    separator: str | None = None,
    split: str | None = None,
    first_line: bool = False,
    skip_missing_images: bool = False,
    follow_links: bool = False,
    max_bad_fraction: float = 0.01,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SampleIndex:
    """The index of a captioned data set, from its cache or built now.

    The cache is rebuilt when the source has changed (size or modification time), the index is
    damaged, or an image that was missing is there; a link at its path is replaced. Images
    themselves are not watched: one that disappears is counted when it is read.

    Args:
        source: an annotation file, a folder, a tar shard or a pattern of shards.
        dataset_type: one of DATASET_TYPES; auto goes by the name and, for .json, the first byte.
        image_root: directory of the image paths; by default the directory of the annotation file.
        image_key, caption_key: names of the fields; by default the names in `himo.data.records`.
        separator: of csv; by default whichever of tab, comma and semicolon gives the columns.
        split: reads the records of one split, of a file whose records have the key `split`.
        first_line: of a folder; see `Folder`.
        skip_missing_images: leaves out images that do not exist, which is otherwise an error.
        follow_links: lets links below the image root lead out of it.
        max_bad_fraction: the largest fraction of the records that may be malformed.
        cache_dir: where the index is stored; by default next to the source, or in
            $XDG_CACHE_HOME/himo (~/.cache/himo) where that is not writable.
        progress: shows a bar when building takes more than 2 seconds.

    Raises:
        HimoError: a fault of the source or an argument, with file and line.
    """
    path = os.path.abspath(source)
    if not 0 <= max_bad_fraction <= 1:
        raise HimoError(f"max_bad_fraction: expected 0 to 1, got {max_bad_fraction}")
    given = {
        "image_key": image_key,
        "caption_key": caption_key,
        "separator": separator,
        "split": split,
        "first_line": first_line,
        "follow_links": follow_links,
    }
    reader = _reader(path, dataset_type, given)
    if reader.kind not in ("dci", "folder", "webdataset"):
        regular_file(path)
    elif reader.kind != "dci" and image_root is not None:
        raise HimoError(f"image_root: a {reader.kind} data set holds its images, leave it out")
    directory = image_root or reader.image_root
    root = ImageRoot(directory, follow_links) if directory is not None else None
    identity = {
        "kind": reader.kind,
        "path": os.path.realpath(path),
        "root": root.root if root is not None else None,
        "follow_links": follow_links,
        "skip_missing_images": skip_missing_images,
        **reader.options(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = os.fsencode(os.path.basename(path))[:150].decode(errors="ignore")  # 255 bytes with all
    file = os.path.join(_cache_directory(path, cache_dir), f"{name}.{key[:16]}.himo-index")
    origin = Origin(reader.path, reader.kind, root, reader.shards)
    index = _cached(file, origin, key, reader.stamp(), max_bad_fraction)
    if index is None:
        write_index(
            file,
            reader,
            root,
            key=key,
            skip_missing_images=skip_missing_images,
            max_bad_fraction=max_bad_fraction,
            progress=progress,
        )
        index = SampleIndex(file, origin)
    return index


def _reader(path: str, dataset_type: str, given: dict[str, Any]) -> Source:
    kind = _detect(path) if dataset_type == "auto" else dataset_type
    if kind not in _FORMATS:
        raise HimoError(
            f"dataset_type: expected one of {', '.join(DATASET_TYPES)}, got {dataset_type!r}"
        )
    make, names = _FORMATS[kind]
    for name, value in given.items():
        if value not in (None, False) and name not in (*names, "follow_links"):
            raise HimoError(f"{name}: means nothing for a data set of type {kind}: {path}")
    return make(path, **{name: given[name] for name in names})


def _detect(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return "webdataset" if any(map(is_shard, list_directory(path))) else "folder"
    if is_shard(os.path.basename(path)):
        return "webdataset"
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    if suffix in (".json", ".txt") and os.path.exists(path):
        with open_regular(path) as file:
            start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
        if suffix == ".json":
            if IMAGE_LIST.match(start):
                return "image-list"
            # Some files of this name hold one object on each line.
            return "jsonl" if start.startswith(b"{") else "sharegpt4v"
        if FLICKR_LINE.match(start):
            return "flickr"
    if not os.path.exists(path):
        raise HimoError(f"{path}: no such file or folder")
    with open_regular(path) as file:
        check_uncompressed(path, file.read(START))
    known = ", ".join(sorted([*_SUFFIXES, ".json", ".tar"]))
    raise HimoError(
        f"{path}: cannot tell the format: expected a folder or one of {known}, or a dataset_type"
    )


def _cache_directory(path: str, given: str | os.PathLike[str] | None) -> str:
    parent = os.path.dirname(path)
    if given is None and os.path.isdir(parent) and os.access(parent, os.W_OK):
        return parent
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = os.fspath(given) if given is not None else os.path.join(home, "himo")
    try:
        os.makedirs(directory, exist_ok=True)
    except (OSError, ValueError, RecursionError) as error:  # a NUL in the path, or a deep one
        message = f"cache directory {directory}: cannot be made: {os_reason(error)}"
        raise HimoError(message) from error
    return directory


def _cached(
    file: str, origin: Origin, key: str, stamp: str, max_bad_fraction: float
) -> SampleIndex | None:
    """The index in `file`; None if it is missing, damaged or out of date."""
    try:
        index = SampleIndex(file, origin)
        index.report.check(max_bad_fraction)  # where too many were bad, the data are read again
    except HimoError:
        return None
    return index if index.is_current(key, stamp) else None
