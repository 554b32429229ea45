"""Text to token ids by CLIP's byte-pair encoding; the ids equal those of OpenAI's release.

A text is cleaned (ftfy, HTML entities, runs of white space), lowered, split into words by a regular
expression, and each word is merged from its UTF-8 bytes by the ranked merges of the vocabulary
(`himo/vocabulary/README.md` has its source and the layout of the ids). To save time, printable
ASCII is not cleaned, and the ids of every chunk between two spaces are cached. By hand, because the
libraries for it download the vocabulary, need a compiled core or both.
"""

import functools
import gzip
import hashlib
import heapq
import html
import importlib.metadata
import unicodedata
import warnings
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor

from himo.errors import HimoError

START_OF_TEXT = 49_406
END_OF_TEXT = 49_407  # the highest id: the text towers find the end of a text by argmax
CONTEXT_LENGTH = 248
_START, _END = (array("H", [number]).tobytes() for number in (START_OF_TEXT, END_OF_TEXT))

_VOCABULARY = Path(__file__).with_name("vocabulary") / "bpe_merges.txt.gz"
_VOCABULARY_SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"  # unpacked

# CLIP's expression. None of its matches holds white space, so splitting the text at spaces first
# changes nothing, and a match by itself matches as a whole: one cache serves chunks and words.
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_SPECIAL = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
_WHITE_SPACE = regex.compile(r"\s+")
# About 20 MB when full; the cache is then cleared, and frequent chunks soon fill it again.
_CACHED_CHUNKS = 1 << 17
_CACHED_CHUNK_LENGTH = 64  # characters; longer chunks rarely come twice

# The version of what this file does to a text: counted up where that changes, so that no cache of
# tokens outlives it.
_RULES = 1

# Most characters of a text that are cleaned: 33 for each of 248 tokens; English has 4 to 5.
MAX_CLEANED = 8192

# ftfy undoes nested entities (&amp;amp;...) one level at a time, each time over the whole text:
# 2.4 s for 8,192 characters of them. More than eight levels count as eight.
_NESTED = regex.compile(r"&(?:(?:amp|AMP|#0*38|#[xX]0*26);){9,}")
_DEEPEST = "&" + 8 * "amp;"
# Python converts no decimal number of more than 4,300 digits. Beyond U+10FFFF all are U+FFFD.
_NUMBER = regex.compile(r"&#0*([0-9]+)")
_MAX_DIGITS = 8

_truncation_reported = False


class TextError(HimoError):
    """A text that the tokenizer cannot read; `reason` is the word to count it by."""

    reason = "text"


def tokenize(
    texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = True
) -> Tensor:
    """Token ids of each text between start-of-text and end-of-text, padded with 0.

    Equal to `clip.tokenize` of OpenAI's CLIP and of the HiMo-CLIP release, except that a long text
    is cut by default. As there, `<|startoftext|>` and `<|endoftext|>` inside a text become the
    special tokens, so an encoder reads such a text only to the first `<|endoftext|>`. Lone
    surrogates count as U+FFFD, and an ampersand that is escaped more than eight times over counts
    as escaped eight times. Of a text that needs cleaning (it is not ASCII, or holds `&` or a
    control character) no more than the first MAX_CLEANED characters are read.

    Args:
        texts: one text, or a list or tuple of B texts; may be empty.
        context_length: tokens per row, start and end included; at least 2.
        truncate: cut a longer text to its first tokens, with end-of-text last. The first cut in a
            process warns.

    Returns:
        int32 [B, context_length]; B = 1 for a str.

    Raises:
        HimoError: `texts` holds something else than str, `context_length` is no integer of at
            least 2, or a text is too long, in tokens or to be cleaned, and `truncate` is False.
        TextError: a library refuses a text; no such text is known.
    """
    ids = default_tokenizer().encode_batch(texts, context_length, truncate)
    return torch.from_numpy(ids.astype(np.int32))


class Tokenizer:
    """CLIP's tokenizer; `default_tokenizer()` is the shared one.

    Reading the vocabulary takes about 0.1 s. A pickle has no cache.

    Raises:
        HimoError: the vocabulary is missing or is not the one this version was written for.
    """

    def __init__(self) -> None:
        merges, byte_ids, self._pieces = _read_vocabulary()
        self._chunks = _ChunkCache(merges, byte_ids)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[()]]:
        return (Tokenizer, ())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end; HimoError if it is no str.

        Not truncated, but see `tokenize` for a text of over MAX_CLEANED characters.
        """
        return array("H", self.encode_bytes(text)).tolist()

    def encode_bytes(self, text: str) -> bytes:
        """The ids of `encode` as the bytes of an array of uint16."""
        _check_text(text, "text")
        return self._encode(text)

    def encode_batch(
        self,
        texts: str | Sequence[str],
        context_length: int = CONTEXT_LENGTH,
        truncate: bool = True,
    ) -> NDArray[np.uint16]:
        """The rows of `tokenize` as uint16 [B, context_length], in half the bytes, for storage."""
        rows, too_long = self.encode_cut(texts, context_length, truncate)
        if too_long:
            report_truncation(too_long, len(rows), context_length, truncate)
        return rows

    def encode_cut(
        self, texts: str | Sequence[str], context_length: int, truncate: bool = True
    ) -> tuple[NDArray[np.uint16], list[tuple[int, int]]]:
        """The rows of `encode_batch`, and (index, length in tokens) of each text that is too long.

        Does not warn about them: for a caller that counts them, because a warning cannot be
        silenced in one thread alone.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list | tuple):
            raise HimoError(
                f"tokenize: expected a str or a list of str, got {type(texts).__name__}"
            )
        if not isinstance(context_length, int) or context_length < 2:
            raise HimoError(
                "tokenize: expected context_length to be an integer of at least 2, got "
                f"{context_length!r:.40}"
            )
        rows, too_long = [], []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                _check_text(text, f"texts[{index}]")
            if not truncate and len(text) > MAX_CLEANED and not _is_clean(text):
                raise HimoError(
                    f"tokenize: expected at most {MAX_CLEANED:,} characters in texts[{index}], "
                    f"which is to be cleaned and not truncated, got {len(text):,}"
                )
            ids = self._encode(text)
            if len(ids) > 2 * (context_length - 2):
                too_long.append((index, len(ids) // 2 + 2))
            rows.append(padded_row(ids, context_length))
        flat = np.frombuffer(bytearray().join(rows), dtype=np.uint16)
        return flat.reshape(len(rows), context_length), too_long

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of token ids, lowered and with a space after each word.

        Takes a row of `tokenize` too: start-of-text is skipped, end-of-text ends the text. Bytes
        that are not UTF-8, as where a row was cut, become U+FFFD.

        Raises:
            HimoError: an id is not in the vocabulary.
        """
        if isinstance(ids, Tensor):
            ids = ids.flatten().tolist()
        pieces = []
        for number in ids:
            if number == END_OF_TEXT:
                break
            if not 0 <= number < END_OF_TEXT:
                raise HimoError(f"decode: expected ids from 0 to {END_OF_TEXT}, got {number}")
            if number != START_OF_TEXT:
                pieces.append(self._pieces[number])
        return b"".join(pieces).decode("utf-8", "replace").rstrip(" ")

    def _encode(self, text: str) -> bytes:
        """Token ids of a text as the bytes of an array of uint16.

        Raises:
            TextError: a library refuses it. A text is untrusted, and html, ftfy and regex do not
                document what they raise: a caller can count the text and continue.
        """
        try:
            return b"".join(map(self._chunks.__getitem__, split_text(text)))
        except Exception as error:
            message = f"text {text[:60]!r} cannot be read: {str(error)[:80]}"
            raise TextError(message) from error


def padded_row(ids: bytes, context_length: int) -> bytes:
    """Ids between start-of-text and end-of-text, cut or padded with 0; all uint16."""
    return (_START + ids[: 2 * (context_length - 2)] + _END).ljust(2 * context_length, b"\0")


def tokenizer_digest() -> str:
    """Changes where ids may: with the vocabulary, the rules and the versions of libraries."""
    versions = [importlib.metadata.version(library) for library in ("ftfy", "regex")]
    parts = [_VOCABULARY_SHA256, _RULES, MAX_CLEANED, unicodedata.unidata_version, *versions]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def default_tokenizer() -> Tokenizer:
    """The tokenizer of this process, made on the first call."""
    return Tokenizer()


def split_text(text: str) -> list[str]:
    """The chunks between spaces of a text, cleaned first if necessary."""
    if _is_clean(text):
        return text.lower().split()
    return clean_text(text[:MAX_CLEANED]).split(" ")


def _is_clean(text: str) -> bool:
    # Cleaning does not change printable ASCII: without `&` there is no entity, and ftfy repairs
    # only control characters and characters outside ASCII.
    return text.isascii() and "&" not in text and text.replace("\n", " ").isprintable()


def clean_text(text: str) -> str:
    """A text as CLIP sees it: repaired, without entities, with single spaces, in lower case."""
    import ftfy  # here, because it takes 0.1 s and few texts need it

    text = _NESTED.sub(_DEEPEST, text)
    text = _unescape(_unescape(ftfy.fix_text(text)))
    return _WHITE_SPACE.sub(" ", text.strip()).strip().lower()


def _unescape(text: str) -> str:
    return html.unescape(_NUMBER.sub(lambda match: f"&#{match[1][:_MAX_DIGITS]}", text))


class _ChunkCache(dict[str, bytes]):
    """From a chunk of text without spaces to its ids, as the bytes of an array of uint16."""

    def __init__(self, merges: dict[tuple[int, int], int], byte_ids: list[int]) -> None:
        super().__init__()
        self._merges = merges
        self._byte_ids = byte_ids

    def __missing__(self, chunk: str) -> bytes:
        words = _WORD.findall(chunk)
        if len(words) == 1 and len(words[0]) == len(chunk):
            special = _SPECIAL.get(chunk)
            ids = array("H", self._merge(chunk) if special is None else [special]).tobytes()
        else:
            ids = b"".join([self[word] for word in words])
        if len(chunk) <= _CACHED_CHUNK_LENGTH:
            if len(self) >= _CACHED_CHUNKS:
                self.clear()
            self[chunk] = ids
        return ids

    def _merge(self, word: str) -> list[int]:
        """Token ids of one word.

        Merges the adjacent pair of the lowest rank, leftmost first, until no pair is in the
        vocabulary. The heap makes this n log n in the length of the word. Pairs of several ranks
        may be in it at once, because no two merges of the vocabulary make the same symbol: a pair
        with a new symbol has a higher rank than the merge that made the symbol.
        """
        merges = self._merges
        symbols = [self._byte_ids[byte] for byte in word.encode()]
        symbols[-1] += 256  # the end-of-word form
        size = len(symbols)
        heap = [
            (merged, left)
            for left, pair in enumerate(pairwise(symbols))
            if (merged := merges.get(pair)) is not None
        ]
        heapq.heapify(heap)
        symbols.append(-1)  # in no pair: the end, and a symbol merged into its neighbour
        following, preceding = list(range(1, size + 2)), list(range(-1, size))
        while heap:
            merged, left = heapq.heappop(heap)
            right = following[left]
            if right > size or merges.get((symbols[left], symbols[right])) != merged:
                continue  # one of the two has been merged since
            symbols[left], symbols[right] = merged, -1
            after, before = following[right], preceding[left]
            following[left], preceding[after] = after, left
            if (new := merges.get((merged, symbols[after]))) is not None:
                heapq.heappush(heap, (new, left))
            if before >= 0 and (new := merges.get((symbols[before], merged))) is not None:
                heapq.heappush(heap, (new, before))
        return [symbol for symbol in symbols if symbol >= 0]


def read_symbols() -> tuple[list[int], dict[str, int], list[str]]:
    """(bytes in the order of their ids, id of each symbol, merges "first second" by rank).

    Symbols are written as in the file, and as Hugging Face's `vocab.json` and `merges.txt` are.

    Raises:
        HimoError: the vocabulary is missing or is not the one this version was written for.
    """
    try:
        text = gzip.decompress(_VOCABULARY.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise HimoError(f"{_VOCABULARY}: cannot be read ({error}); install himo again") from error
    digest = hashlib.sha256(text).hexdigest()
    if digest != _VOCABULARY_SHA256:
        raise HimoError(
            f"{_VOCABULARY}: expected the SHA-256 {_VOCABULARY_SHA256}, got {digest}; "
            "install himo again"
        )
    # The file writes each byte as a visible character: itself where it is one in Latin-1, else
    # one of the 68 from U+0100 on. The ids of the bytes are in that order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = visible + [byte for byte in range(256) if byte not in visible]
    characters = [chr(byte) for byte in visible] + [chr(0x100 + n) for n in range(68)]
    lines = text.decode().splitlines()
    symbols = characters + [character + "</w>" for character in characters]
    symbols += [line.replace(" ", "") for line in lines]
    return order, {symbol: number for number, symbol in enumerate(symbols)} | _SPECIAL, lines


def _read_vocabulary() -> tuple[dict[tuple[int, int], int], list[int], list[bytes]]:
    """The merges {(id, id): id}, the id of each byte, and the bytes of each id but the last two."""
    order, ids, lines = read_symbols()
    byte_ids: list[int] = np.argsort(order).tolist()  # the inverse permutation
    pieces = [bytes([byte]) for byte in order]
    pieces += [piece + b" " for piece in pieces]
    merges: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines, start=len(pieces)):
        first, second = line.split(" ")
        pair = ids[first], ids[second]
        merges[pair] = number
        pieces.append(pieces[pair[0]] + pieces[pair[1]])
    return merges, byte_ids, pieces


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise HimoError(f"tokenize: expected {name} to be a str, got {type(text).__name__}")


def report_truncation(
    too_long: list[tuple[int, int]], count: int, context_length: int, truncate: bool
) -> None:
    """Raises, or warns once per process, about the texts (index, length in tokens)."""
    global _truncation_reported
    index, length = too_long[0]
    message = (
        f"tokenize: {len(too_long)} of {count} texts longer than context_length = "
        f"{context_length} tokens, the first is texts[{index}] with {length}"
    )
    if not truncate:
        raise HimoError(f"{message}; truncate=True would cut the rest")
    if not _truncation_reported:
        _truncation_reported = True
        warnings.warn(
            f"{message}; the rest was cut (reported once per process)", UserWarning, stacklevel=4
        )
