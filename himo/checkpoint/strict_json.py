"""Reads JSON from untrusted files: no ambiguity is accepted, and time and memory are bounded."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from himo.errors import HimoError, quoted
from himo.files import open_regular

MAX_VALUES = 1 << 19  # CLIP's tokenizer has 250,000
MAX_JSON = 1 << 20  # bytes of one object; an index of 5,000 tensors takes half of it


def strict_json(text: bytes, most: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a UTF-8 text of at most `most` bytes.

    Raises:
        ValueError: it is longer, no object, has a key twice, or a number outside JSON (NaN).
    """
    if len(text) > most:
        raise ValueError(f"more than {most:,} bytes of JSON")
    # A Python object takes up to a hundred times the bytes of its JSON.
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values in JSON")
    return _object(text, _no_duplicates)


def require_no_duplicates(text: bytes) -> None:
    """Raises ValueError as `strict_json`, without limits: it stores no value."""

    def forget(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _no_duplicates(pairs)
        return {}

    _object(text, forget)


def read_json(path: str, most: int = MAX_JSON) -> tuple[dict[str, Any], bytes]:
    """(JSON object, bytes) of a file; HimoError if it is missing or `strict_json` refuses it."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    try:
        return strict_json(content, most), content
    except ValueError as error:
        raise HimoError(f"{path}: not the JSON expected: {error}") from error


def _object(text: bytes, hook: Callable[[list[tuple[str, Any]]], dict[str, Any]]) -> dict[str, Any]:
    try:
        content = json.loads(text.decode(), object_pairs_hook=hook, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("JSON too deep") from error
    except json.JSONDecodeError as error:  # its message quotes nothing of the text
        raise ValueError(f"no JSON: {error}") from error
    except UnicodeDecodeError as error:  # its message quotes the whole text
        raise ValueError(f"no UTF-8 at byte {error.start}") from error
    if not isinstance(content, dict):
        raise ValueError(f"JSON of a {type(content).__name__}, expected an object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{quoted(counts.most_common(1)[0][0])} twice")
    return content
