"""Reads the tensors of `.pt` files: zip archives, TorchScript archives, and the older flat format.

Code, optimizer states and settings are not read. The sizes of all tensors are checked against the
size of the file before memory is allocated for any of them.
"""

import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

import torch
from torch import Tensor

from himo.checkpoint.layouts import holds_clip
from himo.checkpoint.pickles import (
    REMEDY,
    Object,
    PickleError,
    StorageRecord,
    TensorRecord,
    read_pickle,
)
from himo.checkpoint.safetensors_files import MAX_TENSORS
from himo.errors import HimoError, quoted

_MAX_PICKLE = 4 << 20  # bytes; a state dict of a thousand tensors takes 200 kB
_MAX_HEAD = 1000  # instructions of the small pickles that start a flat file
_MAX_DIRECTORY = 2 << 20  # bytes of a zip archive's list of records; a thousand take 100 kB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_LEGACY_PROTOCOL = 1001
_BLOCK = 1 << 20  # bytes read at a time
_MAX_DEPTH = 64  # of nested modules
_MAX_NAME = 1000  # characters of the joined names of nested modules
_MAX_WRAPPERS = 8  # dictionaries around a state dict

# Reads the values of a storage: a tensor [numel] of its dtype.
_Reader = Callable[[StorageRecord], Tensor]


@dataclass
class Weights:
    """The tensors of a checkpoint under the names of their file.

    The container is "safetensors", "torch", "torchscript" or "torch legacy", or "none" for an empty
    index. Notes are sentences for the user on what was left out.
    """

    tensors: dict[str, Tensor]
    container: str
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_zip(file: BinaryIO, path: str) -> Weights:
    """The state dict in an archive of torch.save or torch.jit.save.

    Each record is checked against its CRC-32, which torch stores.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(_ShortReads(file)) as archive:
            return _read_archive(archive, os.fstat(file.fileno()).st_size)
    except (zipfile.BadZipFile, PickleError) as error:
        raise HimoError(f"{path}: not read: {error}") from error
    # zipfile raises these for damaged fields (RuntimeError: encrypted).
    except (EOFError, NotImplementedError, OSError, OverflowError, RuntimeError,
            ValueError, struct.error) as error:  # fmt: skip
        cause = quoted(str(error))
        raise HimoError(f"{path}: not read: a damaged zip archive ({cause})") from error


def read_legacy(file: BinaryIO, path: str) -> Weights:
    """The state dict in the flat format that torch.save wrote before 1.6, which has no checksum.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    size = os.fstat(file.fileno()).st_size
    head = BytesIO(file.read(_MAX_PICKLE))
    storages: dict[str, StorageRecord] = {}
    try:
        if read_pickle(head, most=_MAX_HEAD) != _LEGACY_MAGIC:
            raise PickleError("a pickle that torch.save did not write")
        protocol, _ = (read_pickle(head, most=_MAX_HEAD) for _ in range(2))
        content = read_pickle(head, storages)
        keys = read_pickle(head, most=4 * MAX_TENSORS)
        if protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
            raise PickleError(f"the legacy format in an unknown version, {quoted(protocol)}")
        records, notes = _state_dict(content)
        file.seek(head.tell())
        starts = _legacy_starts(file, keys, storages, size)

        def read(storage: StorageRecord) -> Tensor:
            file.seek(starts[storage.key])
            return _read_values(file, storage)

        return Weights(_tensors(records, size, read), "torch legacy", notes=notes)
    except (LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        cause = str(error) if isinstance(error, PickleError) else quoted(str(error))
        raise HimoError(f"{path}: not read: {cause}") from error


def _legacy_starts(
    file: BinaryIO, keys: list[Any], storages: Mapping[str, StorageRecord], size: int
) -> dict[str, int]:
    """The offset of each storage's first byte; reads the file from the first count on."""
    starts: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in starts:
            raise PickleError(f"a storage {quoted(key)} that no tensor uses")
        count = file.read(8)
        if len(count) < 8:
            raise PickleError(f"truncated: storage {quoted(key)} begins beyond the file")
        (numel,) = struct.unpack("<q", count)
        if numel != storage.numel:
            raise PickleError(f"storage {quoted(key)} of {numel} values, not {storage.numel}")
        starts[key] = file.tell()
        end = starts[key] + numel * storage.dtype.itemsize
        if end > size:
            raise PickleError(f"truncated: storage {quoted(key)} ends beyond the file")
        file.seek(end)
    return starts


def _read_archive(archive: zipfile.ZipFile, size: int) -> Weights:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise PickleError("a zip archive with two records of one name")
    root = next((n.removesuffix("data.pkl") for n in entries if n.endswith("/data.pkl")), None)
    if root is None or root.count("/") != 1:
        if any(name.endswith(("/models/model.json", "/archive_format")) for name in entries):
            raise PickleError("a torch.export archive (.pt2): a program, not a state dict")
        raise PickleError("a zip archive, but not of torch.save or torch.jit.save")

    def open_record(name: str, limit: int) -> tuple[Any, int]:
        entry = entries.get(root + name)
        if entry is None:
            raise PickleError(f"no record {quoted(name)}")
        # torch never compresses, so that it can map records; a bomb would be compressed.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise PickleError(f"record {quoted(name)} is compressed, as torch.save never does")
        if entry.file_size > limit:
            raise PickleError(
                f"record {quoted(name)} of {entry.file_size:,} bytes, more than {limit:,}; "
                + REMEDY
            )
        return archive.open(entry), entry.file_size

    if root + "byteorder" in entries:
        record, _ = open_record("byteorder", 16)
        order = record.read()
        if order != b"little":
            raise PickleError(f"byte order {order!r}, expected b'little'")
    record, _ = open_record("data.pkl", min(_MAX_PICKLE, size))
    pickled = BytesIO(b"".join(iter(lambda: record.read(_BLOCK), b"")))
    records, notes = _state_dict(read_pickle(pickled))

    def read(storage: StorageRecord) -> Tensor:
        record, length = open_record(f"data/{storage.key}", size)
        if length != storage.numel * storage.dtype.itemsize:
            raise PickleError(
                f"storage {quoted(storage.key)} of {length:,} bytes, expected {storage.numel:,} "
                f"values of {storage.dtype}"
            )
        return _read_values(record, storage)

    container = "torchscript" if root + "constants.pkl" in entries else "torch"
    return Weights(_tensors(records, size, read), container, notes=notes)


def _state_dict(content: Any) -> tuple[dict[str, TensorRecord], list[str]]:
    """(state dict, notes) of a pickle's content; of several, the first with a CLIP's names.

    Training scripts put it under a key ("model", "state_dict", ...), in other dictionaries and
    next to averaged weights. A CLIP under a key with "ema" is taken only if there is no other.
    """
    found = [(keys, values) for keys, values in _named_tensors(content) if holds_clip(values)]
    found.sort(key=lambda item: any("ema" in key.lower() for key in item[0]))  # keeps the order
    found = found or list(_named_tensors(content))[:1]
    if not found:
        raise PickleError(
            f"{_kind(content)} without tensors by name, expected a state dict; {REMEDY}"
        )
    (keys, values), *others = found
    for name, value in values.items():
        if isinstance(value, Object) and value.name.startswith("torch."):
            raise PickleError(
                f"{quoted(name)} is {_kind(value)}, expected a dense tensor; {REMEDY}"
            )
    records = {n: r for n, r in values.items() if isinstance(r, TensorRecord)}
    notes = []
    if others:
        notes.append(
            f"holds {len(found)} models: read is {_place(keys)}, "
            f"not {', '.join(_place(keys) for keys, _ in others[:3])}"
        )
    return records, notes


def _named_tensors(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(keys to it, names and values) of each dictionary or module that holds tensors."""
    seen: set[int] = set()
    todo: list[tuple[tuple[str, ...], Any]] = [((), content)]
    for keys, value in todo:  # grows: a wrapper comes before its content
        if id(value) in seen or len(keys) > _MAX_WRAPPERS:
            continue
        seen.add(id(value))
        if isinstance(value, Object) and (value.is_script_module or "_modules" in value.attributes):
            yield keys, _flatten(value)
            continue
        items = value.attributes if isinstance(value, Object) else value
        if not isinstance(items, dict):
            continue
        named = {key: item for key, item in items.items() if isinstance(key, str)}
        if any(isinstance(item, TensorRecord) for item in named.values()):
            yield keys, named
        inner = ((key, item) for key, item in named.items() if isinstance(item, dict | Object))
        todo.extend(((*keys, key), item) for key, item in inner)


def _flatten(module: Object) -> dict[str, TensorRecord]:
    """The tensors of a TorchScript or pickled module and its submodules, by dotted name."""
    tensors: dict[str, TensorRecord] = {}
    seen: set[int] = set()
    todo = [("", module, 0)]
    while todo:
        prefix, current, depth = todo.pop()
        if id(current) in seen or depth > _MAX_DEPTH:
            raise PickleError("a module that holds itself, or is held twice")
        seen.add(id(current))
        parts = [current.attributes] if current.is_script_module else [
            part
            for kind in ("_parameters", "_buffers", "_modules")
            if isinstance(part := current.attributes.get(kind), dict)
        ]  # fmt: skip
        for name, value in (item for part in parts for item in part.items()):
            if not isinstance(name, str):
                continue
            if len(prefix) + len(name) >= _MAX_NAME:
                raise PickleError(f"the name of a tensor has {_MAX_NAME:,} characters or more")
            if isinstance(value, Object):
                todo.append((f"{prefix}{name}.", value, depth + 1))
            elif isinstance(value, TensorRecord):
                tensors[f"{prefix}{name}"] = value
    return tensors


def _place(keys: tuple[str, ...]) -> str:
    return quoted(".".join(keys)) if keys else "the one at the top"


def _kind(value: Any) -> str:
    if isinstance(value, Object):
        return f"a {quoted(value.name)[1:-1]}"
    return f"a {type(value).__name__}"


def _tensors(records: Mapping[str, TensorRecord], size: int, read: _Reader) -> dict[str, Tensor]:
    """The tensors by name. Each storage is read once."""
    if len(records) > MAX_TENSORS:
        raise PickleError(f"{len(records):,} tensors, expected at most {MAX_TENSORS:,}")
    storages: dict[str, StorageRecord] = {}
    names: dict[str, list[str]] = {}  # by storage
    total = 0
    for name, record in records.items():
        storage = storages.setdefault(record.storage.key, record.storage)
        if (storage.dtype, storage.numel) != (record.storage.dtype, record.storage.numel):
            raise PickleError(f"storage {quoted(storage.key)} in two sizes")
        names.setdefault(storage.key, []).append(name)
        total += math.prod(record.size) * storage.dtype.itemsize
    total = max(total, sum(s.numel * s.dtype.itemsize for s in storages.values()))
    if total > size:
        raise PickleError(f"tensors of {total:,} bytes declared in a file of {size:,}")
    tensors: dict[str, Tensor] = {}
    for key, sharing in names.items():
        values = read(storages[key])
        for name in sharing:
            part = _part(records[name], name, values)
            # Copied if it is a part of its storage or not contiguous.
            whole = len(sharing) == 1 and part.numel() == values.numel()
            part = part.contiguous()
            tensors[name] = part if whole else part.clone()
    return {name: tensors[name] for name in records}


def _part(record: TensorRecord, name: str, values: Tensor) -> Tensor:
    steps = zip(record.size, record.stride, strict=True)
    last = record.offset + sum((size - 1) * stride for size, stride in steps)
    if 0 in record.size:
        return values.new_empty(record.size)
    if last >= values.numel():
        raise PickleError(
            f"tensor {quoted(name)} reaches value {last:,} of a storage of {values.numel():,}"
        )
    return values.as_strided(record.size, record.stride, record.offset)


def _read_values(file: Any, storage: StorageRecord) -> Tensor:
    values = torch.empty(storage.numel, dtype=storage.dtype)
    if storage.numel:
        buffer = values.view(torch.uint8).numpy().data
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done : done + _BLOCK])
            if not count:
                raise PickleError(f"truncated: storage {quoted(storage.key)}")
            done += count
    if isinstance(file, zipfile.ZipExtFile) and file.read(1):  # reading to the end checks the CRC
        raise PickleError(f"storage {quoted(storage.key)} longer than it says")
    return values


class _ShortReads:
    """Bounds what zipfile reads at once, because it reads an archive's list of records whole."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell, self.seekable = file, file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        most = _MAX_DIRECTORY + 1
        content = self.file.read(most if size < 0 else min(size, most))
        if len(content) == most:
            raise PickleError(f"a zip archive with a list of more than {_MAX_DIRECTORY:,} bytes")
        return content
