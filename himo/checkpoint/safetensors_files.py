"""Reads and writes safetensors files, with a SHA-256 that covers every bit of those himo writes.

The layout is https://github.com/huggingface/safetensors#format: the header's length in 8 bytes,
little-endian; a JSON header; the tensors without gaps. The format has no checksum and no reader
of it notices a flipped bit. himo stores one in the header's metadata: the SHA-256 of the whole
file in which its own 64 digits are zeros. A file of himo's that lacks it is refused; a file of
others may lack it.
"""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

import torch
from torch import Tensor

from himo.errors import HimoError
from himo.files import atomic_path

DIGEST = "himo_sha256"
_OWN_PREFIX = "himo_"  # of the metadata keys that himo writes
_MAX_HEADER = 16 << 20  # bytes; a thousand tensors take 150 kB
_NO_DIGEST = b"0" * 64
_DIGEST_PATTERN = re.compile(b'"' + DIGEST.encode() + b'" *: *"([0-9a-f]{64})"')
_BLOCK = 8 << 20  # bytes hashed at a time: what is read is still in the cache

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(file: BufferedReader, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file whose digest, if it has one, is right.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or length > min(size - 8, _MAX_HEADER):
        raise HimoError(
            f"{path}: damaged: a safetensors header of {length:,} bytes in a file of {size:,}"
        )
    header = file.read(length)
    try:
        content = strict_json(header)
        metadata = _metadata(content)
        layout = _layout(content, size - 8 - length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise HimoError(f"{path}: damaged: its safetensors header is wrong: {error}") from error
    place = _find_stored_digest(header, metadata, path)
    digest = hashlib.sha256(length_bytes)
    if place is not None:
        digest.update(header[: place.start] + _NO_DIGEST + header[place.stop :])
    tensors = {}
    for name, dtype, shape in layout:
        tensors[name] = torch.empty(shape, dtype=dtype)
        buffer = _bytes_of(tensors[name])
        for start in range(0, len(buffer), _BLOCK):
            block = buffer[start : start + _BLOCK]
            if file.readinto(block) != len(block):
                raise HimoError(f"{path}: damaged: truncated in {name}")
            if place is not None:
                digest.update(block)
    if place is not None and digest.hexdigest() != metadata[DIGEST]:
        raise HimoError(
            f"{path}: damaged: its SHA-256 is {digest.hexdigest()}, expected {metadata[DIGEST]}"
        )
    return tensors, metadata


def write_safetensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file atomically, and returns its digest, which it adds to metadata.

    The same tensors and metadata give the same bytes.

    Raises:
        HimoError: there is no space, or the directory is missing or read-only.
    """
    header: dict[str, Any] = {"__metadata__": {**metadata, DIGEST: _NO_DIGEST.decode()}}
    # Wide types first, so that every tensor starts at a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    place = 8 + _find_digest(text).start
    digest = hashlib.sha256()
    with (
        atomic_path(path, needed=8 + len(text) + end) as temporary,
        open(temporary, "wb") as file,
    ):
        for part in (struct.pack("<Q", len(text)), text):
            file.write(part)
            digest.update(part)
        for name in order:
            buffer = _bytes_of(tensors[name].detach().cpu().contiguous())
            for start in range(0, len(buffer), _BLOCK):
                file.write(buffer[start : start + _BLOCK])
                digest.update(buffer[start : start + _BLOCK])
        file.seek(place)
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def _find_stored_digest(header: bytes, metadata: Mapping[str, str], path: str) -> slice | None:
    if DIGEST not in metadata:
        if any(key.startswith(_OWN_PREFIX) for key in metadata):
            raise HimoError(f"{path}: damaged: himo wrote it, but its {DIGEST} is gone")
        return None
    try:
        return _find_digest(header)
    except ValueError as error:
        raise HimoError(f"{path}: damaged: {error}") from error


def _find_digest(header: bytes) -> slice:
    places = [slice(*match.span(1)) for match in _DIGEST_PATTERN.finditer(header)]
    if len(places) != 1:
        raise ValueError(f"expected one {DIGEST} in the metadata, of 64 digits")
    return places[0]


def strict_json(text: bytes) -> dict[str, Any]:
    """The JSON object of a UTF-8 text.

    Raises:
        ValueError: it is none, has a key twice, or a number that JSON does not know (NaN).
    """
    try:
        content = json.loads(
            text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise ValueError("JSON too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"JSON of a {type(content).__name__}, expected an object")
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} twice")
    return content


def _metadata(content: Any) -> dict[str, str]:
    metadata = content.pop("__metadata__", {})
    if any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")
    return dict(metadata)


def _layout(content: dict[str, Any], size: int) -> list[tuple[str, torch.dtype, list[int]]]:
    """(name, dtype, shape) of each tensor, in the order of the file, which they fill."""
    entries = sorted(content.items(), key=lambda item: item[1]["data_offsets"])
    layout, position = [], 0
    for name, entry in entries:
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} has the dtype {entry['dtype']!r}, which no CLIP has")
        if any(type(x) is not int or x < 0 for x in (*shape, start, end)):
            raise ValueError(f"{name} has the shape {shape} at {[start, end]}")
        length = math.prod(shape) * dtype.itemsize
        if start != position or end - start != length:
            raise ValueError(
                f"{name}, {length:,} bytes of {dtype}, is at {start:,} to {end:,}, expected at "
                f"{position:,}"
            )
        position = end
        layout.append((name, dtype, shape))
    if position != size:
        raise ValueError(f"tensors of {position:,} bytes, and {size:,} bytes of data")
    return layout


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
