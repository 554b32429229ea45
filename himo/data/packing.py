"""Shards of images that are already small: what `himo pack` writes.

A shard is a tar file of the webdataset convention. Record 7 has three files: `000000007.jpg` (or
`.webp`) is the image, `000000007.txt` the caption. `000000007.json` has `image` (the path in the
source), `line` (the line there), `caption` and `caption_short`. A shard is written whole or not at
all, and depends only on the records and the options. `pack.json` names the finished shards, so a
killed pack continues with the next one.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from himo.data.index import SampleIndex
from himo.data.records import list_directory
from himo.data.workers import in_order
from himo.errors import HimoError, printable
from himo.files import (
    atomic_path,
    json_value,
    open_regular,
    os_reason,
    remove_abandoned,
    write_text,
)
from himo.images import MAX_PIXELS, ImageError, Source, decode, source_name

MANIFEST = "pack.json"
FORMATS = {"jpeg": "jpg", "webp": "webp"}  # and the suffix of a member
_CHUNK = 16  # images that a worker makes at a time
_EXAMPLES = 5  # of images that cannot be read, for each shard and in a message
_DRAFT_SIDES = 2  # in fast mode a JPEG is shrunk while decoded, to no less than twice the size
_MAX_MANIFEST = 1 << 28  # bytes; a shard takes 100 and, with bad images, 1,000


@dataclass(frozen=True)
class PackOptions:
    """The options that, with the records, decide the content of the shards.

    Attributes:
        size: pixels of the short side; a smaller image keeps its size.
        format: of the images, a key of FORMATS.
        quality: of the encoder, 1 to 100.
        mode: of the decoder and resize; see `himo.transforms.Preprocess`.
        shard_pairs: records of a shard, including those that cannot be read.
    """

    size: int = 256
    format: str = "jpeg"
    quality: int = 90
    mode: Literal["exact", "fast"] = "exact"
    shard_pairs: int = 10_000


@dataclass
class Packed:
    """What the shards hold.

    Attributes:
        shards: number of them.
        pairs: in all shards.
        size: bytes of all shards.
        resumed: shards that were there.
        bad: images that could not be read, by reason.
        examples: messages of the first of them.
    """

    shards: int
    pairs: int
    size: int
    resumed: int
    bad: dict[str, int]
    examples: list[str]


def small_image(source: Source, options: PackOptions) -> bytes:
    """An image as it is in a shard.

    It is RGB or grey, without metadata, its short side shrunk to the size by the bicubic filter.

    Raises:
        ImageError: it cannot be read, or is too long for the format.
    """
    side = _DRAFT_SIDES * options.size if options.mode == "fast" else None
    image, (width, height) = decode(source, MAX_PIXELS, side)
    buffer = io.BytesIO()
    try:
        image = image if image.mode == "L" else image.convert("RGB")
        short = min(width, height)
        if short > options.size:  # of the header: a decoder that shrinks rounds
            size = (options.size * width // short, options.size * height // short)
            image = image.resize(size, Image.Resampling.BICUBIC)
        image.info = {}  # comments and colour profiles, which Pillow would write again
        image.save(buffer, options.format.upper(), quality=options.quality)
    except (ValueError, OSError) as error:
        shape = f"{width} x {height} pixels of mode {image.mode}"
        message = f"{source_name(source)}: {shape} cannot be written as {options.format} ({error})"
        raise ImageError(message, "unknown_format") from error
    return buffer.getvalue()


def pack(
    index: SampleIndex,
    directory: str | os.PathLike[str],
    options: PackOptions,
    *,
    workers: int = 0,
    max_bad_fraction: float = 0.01,
    progress: bool = True,
) -> Packed:
    """Writes the samples of an index to shards in a directory, or the shards that are missing.

    Args:
        index: the samples.
        directory: is made if it does not exist. It is empty, or holds shards of the same records
            and options.
        options: of the shards.
        workers: processes that read and write images; 0 means this process alone.
        max_bad_fraction: the largest fraction of the images that may be unreadable.
        progress: shows a bar.

    Raises:
        HimoError: the directory is of another pack, or holds other files; too many bad images; what
            `atomic_path` raises.
    """
    folder = _Folder(Path(directory), index, options)
    shards = [
        range(first, min(first + options.shard_pairs, len(index)))
        for first in range(0, len(index), options.shard_pairs)
    ]
    missing = [number for number in range(len(shards)) if not folder.has(number)]
    resumed = len(shards) - len(missing)
    bar = tqdm(
        desc=printable(f"pack {folder.path.name}"),
        total=len(index),
        initial=len(index) - sum(len(shards[number]) for number in missing),
        unit=" pairs",
        disable=not progress,
    )
    images = _Images(index, options, [row for number in missing for row in shards[number]])
    made: Any = in_order(images, workers if len(images) > 1 else 0)
    pairs = (pair for chunk in made for pair in chunk)
    with bar, closing(made):
        for number in missing:
            rows = shards[number]
            bad: Counter[str] = Counter()
            examples: list[str] = []
            path = folder.path / shard_name(number)
            with (
                atomic_path(path) as temporary,
                tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for row in rows:
                    data, reason, message = next(pairs)
                    bar.update()
                    if reason:
                        bad[reason] += 1
                        examples = [*examples, message][:_EXAMPLES]
                        folder.check(bad, examples, max_bad_fraction)
                        continue
                    for suffix, content in _files(index, row, data, options):
                        member = tarfile.TarInfo(f"{row:09}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
            folder.add(number, len(rows) - bad.total(), bad, examples)
    return folder.packed(resumed)


def shard_name(number: int) -> str:
    """The name of a shard: 000012.tar."""
    return f"{number:06}.tar"


def _files(
    index: SampleIndex, row: int, image: bytes, options: PackOptions
) -> list[tuple[str, bytes]]:
    """Suffix and content of each file of a sample."""
    record = index[row]
    about: dict[str, Any] = {"image": record.image, "line": record.line, "caption": record.caption}
    if record.caption_short:
        about["caption_short"] = record.caption_short
    text = json.dumps(about, ensure_ascii=False)
    return [
        (FORMATS[options.format], image),
        ("json", text.encode()),
        ("txt", record.caption.encode()),
    ]


class _Images(Dataset[list[tuple[bytes, str, str]]]):
    """Chunks of images as in a shard; where one cannot be read, the reason and the message."""

    def __init__(self, index: SampleIndex, options: PackOptions, rows: list[int]) -> None:
        self.index, self.options, self.rows = index, options, rows

    def __len__(self) -> int:
        return (len(self.rows) + _CHUNK - 1) // _CHUNK

    def __getitem__(self, chunk: int) -> list[tuple[bytes, str, str]]:
        return list(self._made(self.rows[chunk * _CHUNK : (chunk + 1) * _CHUNK]))

    def _made(self, rows: list[int]) -> Iterator[tuple[bytes, str, str]]:
        for row in rows:
            try:
                yield small_image(self.index.image_source(row), self.options), "", ""
            except ImageError as error:
                yield b"", error.reason, f"{self.index.describe(row)}: {error}"


class _Folder:
    """The directory of a pack and its manifest, which is written after each shard."""

    def __init__(self, path: Path, index: SampleIndex, options: PackOptions) -> None:
        self.path, self.records = path, len(index)
        # Of all paths and captions. As in an index, changes of the images are not noticed.
        self.key = {"version": 1, "sha256": index.report.sha256, **asdict(options)}
        self.shards: dict[str, dict[str, Any]] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise HimoError(f"--out {path}: cannot be made: {os_reason(error)}") from error
        remove_abandoned(path)
        if (path / MANIFEST).exists():
            self._read()
        elif list_directory(os.fspath(path)):
            raise HimoError(f"--out {path}: expected an empty folder, or one of an earlier pack")
        self._write()

    def has(self, number: int) -> bool:
        """Whether a shard is there, with the size that it was written with."""
        name = shard_name(number)
        try:
            size = os.stat(self.path / name).st_size
        except OSError:
            return False
        return name in self.shards and self.shards[name]["bytes"] == size

    def add(self, number: int, pairs: int, bad: dict[str, int], examples: list[str]) -> None:
        name = shard_name(number)
        size = os.stat(self.path / name).st_size
        self.shards[name] = {"pairs": pairs, "bytes": size, "bad": dict(bad), "examples": examples}
        self._write()

    def check(self, bad: dict[str, int], examples: list[str], most: float) -> None:
        """HimoError if more than this fraction of all images is bad, including the new shard's."""
        packed = self.packed(0)
        total = Counter(packed.bad) + Counter(bad)
        if total.total() > most * self.records:
            raise HimoError(
                f"{self.path}: {bad_images(total, self.records, packed.examples + examples)}; the "
                f"limit is {100 * most:g} % (--max-bad-fraction); the finished shards are kept"
            )

    def packed(self, resumed: int) -> Packed:
        shards = self.shards.values()
        return Packed(
            len(shards),
            sum(shard["pairs"] for shard in shards),
            sum(shard["bytes"] for shard in shards),
            resumed,
            dict(sum((Counter(shard["bad"]) for shard in shards), Counter())),
            [text for shard in shards for text in shard["examples"]][:_EXAMPLES],
        )

    def _read(self) -> None:
        path = self.path / MANIFEST
        with open_regular(path) as file:
            data = file.read(_MAX_MANIFEST)
        try:
            value = json_value(data)
            key, shards = value["key"], value["shards"]
            self.shards = {str(name): _shard(shard) for name, shard in shards.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HimoError(f"{path}: is damaged; remove the folder to pack anew") from error
        if key != self.key:
            given = key if isinstance(key, dict) else {}
            names = [name for name in self.key if given.get(name) != self.key[name]]
            raise HimoError(
                f"--out {self.path}: holds a pack of other data or options "
                f"({', '.join(names) or 'another version'}): give another folder, or remove it"
            )

    def _write(self) -> None:
        value = {"key": self.key, "shards": dict(sorted(self.shards.items()))}
        write_text(self.path / MANIFEST, json.dumps(value, indent=1) + "\n")


def bad_images(bad: dict[str, int], records: int, examples: list[str]) -> str:
    """How many images could not be read, by reason, and the first of them."""
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
    first = "; ".join(examples[:_EXAMPLES])
    return f"{sum(bad.values())} of {records} images could not be read ({counts}); first: {first}"


def _shard(value: Any) -> dict[str, Any]:
    """An entry of the manifest; ValueError if it is none."""
    counts = [value["pairs"], value["bytes"], *value["bad"].values()]
    texts = [*value["bad"], *value["examples"]]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("counts")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("texts")
    return {name: value[name] for name in ("pairs", "bytes", "bad", "examples")}
