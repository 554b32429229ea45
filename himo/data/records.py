"""What a data set on disk says, record by record, and what is refused of it.

Every format is a `Source` that yields a `Record` for each good record and a `BadRecord` for each
other one. An annotation file is data from anywhere: nothing in it may stop the reader, fill the
memory or take long.
"""

import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from himo.errors import HimoError
from himo.tokenizer import MAX_CLEANED

# Longest record of a text file, in bytes. ShareGPT4V's are about 1,100 and the longest known
# conversations 50,000; a limit keeps a file without any line break from filling the memory.
MAX_RECORD = 1 << 20

# Longest caption, in characters. The text towers read 248 tokens, some 1,200 characters; and what
# is no plain ASCII takes time to clean that grows with the square of its length at worst.
MAX_CAPTION = MAX_CLEANED

# Names of the fields where none is given: open_clip's csv, ShareGPT4V and jsonl, HiMo-Docci.
IMAGE_KEYS = ("filepath", "image", "img_path")
CAPTION_KEYS = ("title", "caption")
SHORT_CAPTION_KEY = "caption_short"

Progress = Callable[[int], None]  # is told how much is read so far, in the unit of the source


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its caption.

    Attributes:
        line: where it stands in the annotation file, from 1; 0 where there is none.
        image: path of the image below the image root, as the file spells it. In a tar shard:
            the name of the member.
        caption: the caption, on one line.
        caption_short: a shorter caption of the same image, or "".
        shard: number of the tar shard that holds the image, or -1.
        offset: first byte of the image in its shard.
        size: bytes of the image in its shard.
    """

    line: int
    image: str
    caption: str
    caption_short: str = ""
    shard: int = -1
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class BadRecord:
    """One record that is left out: `reason` is what it counts as, `message` is one line."""

    reason: str
    message: str


class RecordError(Exception):
    """Says why a value is no record: `reason` is one word to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def at(self, place: str) -> BadRecord:
        return BadRecord(self.reason, f"{place}: {self}")


class Source(ABC):
    """A captioned data set on disk, read once from its beginning to its end."""

    kind: ClassVar[str]  # as --dataset-type names it
    unit: ClassVar[str] = "B"  # of `size` and of what `read` tells of its progress

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.ignored: dict[str, int] = {}  # files passed over, by kind, once `read` is through

    @property
    def image_root(self) -> str | None:
        """Directory of the images where the user names none; None if the source holds them."""
        return os.path.dirname(os.path.abspath(self.path))

    @property
    def shards(self) -> list[str]:
        """Absolute paths of the tar files that hold the images."""
        return []

    def options(self) -> dict[str, Any]:
        """What changes the records besides the files: part of the key of a cached index."""
        return {}

    def stamp(self) -> str:
        """Differs when the files have changed: size and modification time."""
        status = regular_file(self.path)
        return f"{status.st_size}-{status.st_mtime_ns}"

    def size(self) -> int:
        """How much `read` goes through, in `unit`s."""
        return regular_file(self.path).st_size

    @abstractmethod
    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        """Yields every record in order; HimoError if the file as a whole is not of its format."""


def regular_file(path: str) -> os.stat_result:
    """The status of a regular file; HimoError where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HimoError(f"{path}: cannot be read: {reason.lower()}") from error
    if not stat.S_ISREG(status.st_mode):
        raise HimoError(f"{path}: expected a regular file")
    return status


def quote(text: object, limit: int = 80) -> str:
    """`text` for a message: quoted, escaped and cut to about `limit` characters."""
    if isinstance(text, str) and len(text) > limit:
        return f"{text[:limit]!r}... ({len(text):,} characters)"
    shown = repr(text)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quote(twice)} is given twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


# json.loads keeps the last of two equal keys and takes NaN: neither is what the writer meant.
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def json_error(error: Exception) -> RecordError:
    """What the decoder raised, as a reason to leave a record out."""
    if isinstance(error, RecursionError):
        return RecordError("syntax", "nested too deeply")
    text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return RecordError("syntax", f"not valid JSON: {text}")


def check_text(text: Any, what: str) -> str:
    """`text` as one stripped line; RecordError unless it is text that UTF-8 can hold."""
    if not isinstance(text, str):
        raise RecordError("type", f"{what} is {quote(text)}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 arrive as lone surrogates too: see `decode`.
        raise RecordError("encoding", f"{what} {quote(text)} is not valid UTF-8") from error
    if "\0" in text:
        raise RecordError("encoding", f"{what} {quote(text)} holds a NUL character")
    return text.replace("\n", " ").strip()


def make_record(line: int, image: Any, caption: Any, caption_short: Any = None) -> Record:
    """The record of the fields as they were read; RecordError if one cannot be used."""
    name = check_text(image, "image path")
    long = check_text(caption, "caption")
    short = "" if caption_short is None else check_text(caption_short, SHORT_CAPTION_KEY)
    for caption in (long, short):
        if len(caption) > MAX_CAPTION:
            message = f"caption has {len(caption):,} characters, the limit is {MAX_CAPTION:,}"
            raise RecordError("too_long", message)
    if not name or not long:
        raise RecordError("empty", f"{'caption' if name else 'image path'} is empty")
    return Record(line, name, long, short)


def pick(fields: Any, key: str | None, defaults: tuple[str, ...], what: str) -> str:
    """The name of the field to read: `key`, or the first of `defaults` that is there."""
    found = [name for name in ([key] if key is not None else defaults) if name in fields]
    if found:
        return found[0]
    wanted = " or ".join(map(repr, [key] if key is not None else defaults))
    there = ", ".join(quote(name, 40) for name in list(fields)[:10]) or "nothing"
    raise RecordError("missing_key", f"no {what} {wanted}; there is {there}")


def record_of_mapping(
    value: Any, line: int, image_key: str | None, caption_key: str | None
) -> Record:
    """The record of a decoded JSON object; RecordError if a field is missing or no text."""
    if not isinstance(value, dict):
        raise RecordError("type", f"record is {quote(value)}, expected an object")
    image = value[pick(value, image_key, IMAGE_KEYS, "image key")]
    caption = value[pick(value, caption_key, CAPTION_KEYS, "caption key")]
    return make_record(line, image, caption, value.get(SHORT_CAPTION_KEY))


def decode(data: bytes) -> str:
    """Text of UTF-8 bytes; each byte that is not UTF-8 becomes a lone surrogate.

    So a damaged byte spoils its record and not the file: `check_text` refuses surrogates.
    """
    return data.decode("utf-8", errors="surrogateescape")


def check_start(path: str, start: bytes) -> int:
    """Bytes of the byte order mark at the start of a file; HimoError if the text is UTF-16."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise HimoError(f"{path}: is UTF-16 text, expected UTF-8: save it again as UTF-8")
    return 3 if start.startswith(b"\xef\xbb\xbf") else 0


def lines(path: str, file: BinaryIO, progress: Progress) -> Iterator[tuple[int, str | None]]:
    """Yields each line with its number from 1; None for a line longer than MAX_RECORD bytes."""
    number, done = 0, 0
    while data := file.readline(MAX_RECORD + 1):
        number += 1
        done += len(data)
        if number == 1:
            data = data[check_start(path, data) :]
        if len(data) <= MAX_RECORD:
            yield number, decode(data)
        else:
            while data and not data.endswith(b"\n"):
                data = file.readline(MAX_RECORD)
                done += len(data)
            yield number, None
        if number % 1000 == 0:
            progress(done)
    progress(done)
