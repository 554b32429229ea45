"""The records of a data set on disk, and the checks that each one has to pass.

Every format is a `Source` that yields a `Record` for each good record and a `BadRecord` for each
other one. An annotation file is untrusted: nothing in it may stop the reader, fill the memory or
take long.
"""

import io
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, ClassVar

from himo.data.splits import Splits
from himo.errors import HimoError, quoted
from himo.files import open_regular, os_reason
from himo.tokenizer import MAX_CLEANED, TextError, default_tokenizer

# Longest record of a text file, in characters. ShareGPT4V's are about 1,100 and the longest known
# conversations 50,000; a limit keeps a file without any line break from filling the memory.
MAX_RECORD = 1 << 20

# Longest caption, in characters. The text towers read 248 tokens, some 1,200 characters; cleaning a
# text that is not plain ASCII takes time quadratic in its length at worst.
MAX_CAPTION = MAX_CLEANED

START = 32  # bytes of a file by which `check_uncompressed` knows it
MAX_IMAGE = 1 << 26  # bytes of one image in a shard, which is read whole before it is checked

# Default names of the fields, in any case: open_clip's csv, ShareGPT4V and jsonl, HiMo-Docci.
IMAGE_KEYS = ("filepath", "image", "img_path")
CAPTION_KEYS = ("title", "caption")
SHORT_CAPTION_KEY = "caption_short"
CONVERSATION_KEYS = ("conversations", "messages")  # of LLaVA and ShareGPT4V, and of OpenAI
_ASSISTANTS = frozenset(["gpt", "chatgpt", "assistant", "model", "bot"])

Progress = Callable[[int], None]  # gets how much has been read so far, in `Source.unit`


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its caption.

    Attributes:
        line: its line in the annotation file, from 1; 0 where there is no such file.
        image: path of the image below the image root, as the file spells it; in a tar shard, the
            name of the member.
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
    """A record that is left out: `reason` is the word to count it by, `message` is one line."""

    reason: str
    message: str


class RecordError(Exception):
    """A value is not a usable record: `reason` is one word to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def at(self, place: str) -> BadRecord:
        """The bad record at `place`, the file and line."""
        return BadRecord(self.reason, f"{place}: {self}")


class Source(ABC):
    """A captioned data set on disk, read once from its beginning to its end."""

    kind: ClassVar[str]  # as --dataset-type names it
    unit: ClassVar[str] = "B"  # of measure, for `size` and the progress of `read`

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        # Default directory of the images; None if the source holds the images itself.
        self.image_root: str | None = os.path.dirname(os.path.abspath(self.path))
        self.shards: list[str] = []  # absolute paths of the tar files that hold the images
        self.ignored: dict[str, int] = {}  # files skipped, by kind, once `read` has finished
        self.splits: dict[str, int] = {}  # records of each split, all there are; likewise

    def options(self) -> dict[str, Any]:
        """The options that change the records: part of the key of a cached index."""
        return {}

    def stamp(self) -> str:
        """Changes when the files change: size and modification time."""
        status = regular_file(self.path)
        return f"{status.st_size}-{status.st_mtime_ns}"

    def size(self) -> int:
        """How much `read` reads in all, in `unit`."""
        return regular_file(self.path).st_size

    @abstractmethod
    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        """Yields every record in order; HimoError if the file as a whole is not of its format."""


class KeyedSource(Source):
    """A file whose image and caption are under the keys given, or under the default ones."""

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


class ObjectSource(KeyedSource):
    """A file of JSON objects, one for each record.

    Args:
        path, image_key, caption_key: as `KeyedSource`.
        split: reads the records alone whose key `split` has this value.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        image_key: str | None = None,
        caption_key: str | None = None,
        split: str | None = None,
    ) -> None:
        super().__init__(path, image_key, caption_key)
        self.split = split

    def options(self) -> dict[str, Any]:
        return {**super().options(), "split": self.split}

    def read(self, progress: Progress) -> Iterator[Record | BadRecord]:
        splits = Splits(self.split)
        with open_regular(self.path) as file:
            for number, (line, value) in enumerate(self.values(file, progress), start=1):
                try:
                    if isinstance(value, RecordError):
                        raise value
                    if not isinstance(value, dict) or splits.takes(value.get("split")):
                        yield record_of_mapping(value, line, self.image_key, self.caption_key)
                except RecordError as error:
                    yield error.at(self.place(line, number))
        self.splits = splits.counts
        splits.check(self.path)

    @abstractmethod
    def values(self, file: BufferedReader, progress: Progress) -> Iterator[tuple[int, Any]]:
        """Yields the line and the value of each record; a RecordError where it is not JSON."""

    def place(self, line: int, number: int) -> str:
        """Where record `number` is, for messages."""
        return f"{self.path}:{line}"


def regular_file(path: str) -> os.stat_result:
    """The status of a regular file; HimoError if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise HimoError(f"{path}: cannot be read: {os_reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise HimoError(f"{path}: expected a regular file")
    return status


def list_directory(path: str) -> list[str]:
    """The names in a directory; HimoError if it cannot be listed."""
    try:
        return os.listdir(path)
    except OSError as error:
        raise HimoError(f"{path}: cannot be listed: {os_reason(error)}") from error


@dataclass(frozen=True, slots=True)
class _Twice:
    """The value of a key that an object gives twice: neither is taken."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        value |= {key: _Twice(key) for key, count in counts.items() if count > 1}
    return value


def _integer(digits: str) -> int | float:
    # Python refuses to convert more digits than its limit: 4,300 by default, 640 at the least.
    return int(digits) if len(digits) <= 640 else float(digits)


# NaN, an endless number and a key given twice are errors only in a field that is used.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)


def json_error(error: Exception) -> RecordError:
    """An exception of the decoder, as the reason to leave a record out."""
    if isinstance(error, RecursionError):
        return RecordError("syntax", "nested too deeply")
    text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return RecordError("syntax", f"not valid JSON: {text}")


def check_text(text: Any, what: str) -> str:
    """`text` as one stripped line; RecordError unless it is text that UTF-8 can encode."""
    if isinstance(text, _Twice):
        raise RecordError("syntax", f"key {quoted(text.key)} is given twice")
    if not isinstance(text, str):
        raise RecordError("type", f"{what} is {quoted(text)}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 arrive as lone surrogates too: see `decode`.
        raise RecordError("encoding", f"{what} {quoted(text)} is not valid UTF-8") from error
    if "\0" in text:
        raise RecordError("encoding", f"{what} {quoted(text)} holds a NUL character")
    return text.replace("\n", " ").strip()


def check_caption(text: Any, what: str = "caption") -> str:
    """`check_text`, and at most MAX_CAPTION characters."""
    caption = check_text(text, what)
    if len(caption) > MAX_CAPTION:
        message = f"{what} has {len(caption):,} characters, the limit is {MAX_CAPTION:,}"
        raise RecordError("too_long", message)
    return caption


def check_encodable(texts: Sequence[str]) -> None:
    """RecordError if the tokenizer cannot read one of the texts; encodes each of them."""
    try:
        for text in texts:
            default_tokenizer().encode(text)
    except TextError as error:
        raise RecordError(error.reason, str(error)) from error


def make_record(line: int, image: Any, caption: Any, caption_short: Any = None) -> Record:
    """The record of the fields as read; RecordError if one cannot be used."""
    name = check_text(image, "image path")
    long = check_caption(caption)
    short = "" if caption_short is None else check_caption(caption_short, SHORT_CAPTION_KEY)
    if not name or not long:
        raise RecordError("empty", f"{'caption' if name else 'image path'} is empty")
    return Record(line, name, long, short)


def pick(fields: Any, key: str | None, defaults: tuple[str, ...], what: str) -> str:
    """The name of the field to read: `key`, or the first of `defaults` in `fields`.

    Where none is spelled exactly so, upper and lower case are the same: `Image` is `image`.
    """
    names = defaults if key is None else (key,)
    for name in names:
        if name in fields:
            return name
    in_any_case = {field.casefold(): field for field in reversed(list(fields))}
    for name in names:
        if name.casefold() in in_any_case:
            return in_any_case[name.casefold()]
    there = ", ".join(map(quoted, list(fields)[:10])) or "nothing"
    raise RecordError("missing_key", f"no {what} {' or '.join(map(repr, names))}; there is {there}")


def record_of_mapping(
    value: Any, line: int, image_key: str | None, caption_key: str | None
) -> Record:
    """The record of a decoded JSON object; RecordError if a field is missing or not text."""
    caption = caption_of_mapping(value, caption_key)
    image = value[pick(value, image_key, IMAGE_KEYS, "image key")]
    return make_record(line, image, caption, value.get(SHORT_CAPTION_KEY))


def caption_of_mapping(value: Any, caption_key: str | None) -> Any:
    """The caption of a decoded JSON object, unchecked.

    It is the value of `caption_key`. By default it is the assistant's text in the conversation or,
    without a conversation, the value of the first of CAPTION_KEYS.
    """
    if not isinstance(value, dict):
        raise RecordError("type", f"record is {quoted(value)}, expected an object")
    conversation = next((key for key in CONVERSATION_KEYS if key in value), None)
    if caption_key is None and conversation is not None:
        return _assistant_words(value[conversation])
    return value[pick(value, caption_key, CAPTION_KEYS, "caption key")]


def _assistant_words(turns: Any) -> Any:
    """What the assistant's first turn says; the turn is found by its role, not its position."""
    for turn in turns if isinstance(turns, list) else ():
        role = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        if isinstance(role, str) and role.strip().lower() in _ASSISTANTS:
            words = turn.get("value", turn.get("content"))
            if isinstance(words, list):  # OpenAI's form: a list of parts, some of them text
                parts = [part.get("text") if isinstance(part, dict) else part for part in words]
                words = " ".join(part for part in parts if isinstance(part, str))
            return words
    expected = "expected a turn from gpt or assistant"
    raise RecordError("type", f"conversations are {quoted(turns)}, {expected}")


def decode(data: bytes) -> str:
    """Text of UTF-8 bytes; each byte that is not UTF-8 becomes a lone surrogate.

    A damaged byte then costs its record, not the file: `check_text` refuses surrogates.
    """
    return data.decode("utf-8", errors="surrogateescape")


def decode_file(data: bytes) -> str:
    """`decode` of a file that holds one caption; RecordError if it is UTF-16."""
    if data.startswith(_UTF_16):
        raise RecordError("encoding", "is UTF-16 text, expected UTF-8")
    return decode(data.removeprefix(_BYTE_ORDER_MARK))


_BYTE_ORDER_MARK, _UTF_16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_UTF_16_UNMARKED = re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")  # ASCII without that mark
_LFS = b"version https://git-lfs"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compress",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
}


def check_uncompressed(path: str, start: bytes) -> None:
    """HimoError if a file starts as a compressed one does, or as a pointer of Git LFS."""
    if start.startswith(_LFS):
        raise HimoError(f"{path}: a pointer of Git LFS, not the file: run `git lfs pull`")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise HimoError(f"{path}: is compressed ({name}), expected it uncompressed: unpack it")


def check_start(path: str, start: bytes) -> int:
    """The length of the byte order mark at the start of a text file, in bytes.

    Raises:
        HimoError: the file is compressed, or UTF-16.
    """
    check_uncompressed(path, start)
    if start.startswith(_UTF_16) or _UTF_16_UNMARKED.match(start):
        raise HimoError(f"{path}: is UTF-16 text, expected UTF-8: save it again as UTF-8")
    return len(_BYTE_ORDER_MARK) if start.startswith(_BYTE_ORDER_MARK) else 0


def lines(path: str, file: BufferedReader, progress: Progress) -> Iterator[tuple[int, str | None]]:
    r"""Yields each line with its number from 1; None for one longer than MAX_RECORD characters.

    Lines end with \n, \r\n or \r, as Python's do.
    """
    file.read(check_start(path, file.peek(START)))
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    number = 0
    while line := text.readline(MAX_RECORD + 1):
        number += 1
        is_whole = len(line) <= MAX_RECORD
        yield number, line if is_whole else None
        while not is_whole and line and not line.endswith(("\n", "\r")):
            line = text.readline(MAX_RECORD)
        if number % 1000 == 0:
            progress(file.tell())
    progress(file.tell())
