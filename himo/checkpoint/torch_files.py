"""Reads the tensors of `.pt` files: zip archives, TorchScript archives, and the older flat format.

What each holds beside a state dict (code, optimizer) is not read. Every tensor is checked against
the bytes that are there before memory is taken for it.
"""

import math
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any, BinaryIO

import torch
from torch import Tensor

from himo.checkpoint.pickles import (
    PickleError,
    ScriptModule,
    StorageRecord,
    TensorRecord,
    read_pickle,
)
from himo.errors import HimoError

_MAX_PICKLE = 16 << 20  # bytes; a state dict of a thousand tensors takes 200 kB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_LEGACY_PROTOCOL = 1001
_BLOCK = 8 << 20  # bytes read at a time
_MAX_DEPTH = 64  # of modules in modules

# Reads the values of a storage: a tensor [numel] of its dtype.
_Reader = Callable[[StorageRecord], Tensor]


def read_zip(file: BinaryIO, path: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, "torchscript" or "torch") of an archive of torch.save or torch.jit.save.

    Each record read is checked against the CRC-32 that torch stores with it.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, _size(file), path)
    except (zipfile.BadZipFile, PickleError) as error:
        raise HimoError(f"{path}: not read: {error}") from error
    # What zipfile raises for damaged fields, besides BadZipFile (RuntimeError: encrypted).
    except (EOFError, NotImplementedError, OSError, OverflowError, RuntimeError,
            struct.error, UnicodeDecodeError) as error:  # fmt: skip
        raise HimoError(f"{path}: not read: a damaged zip archive ({error})") from error


def read_legacy(file: BinaryIO, path: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, "torch legacy") of the flat format that torch.save wrote before 1.6.

    Nothing in it is a checksum.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    size = _size(file)
    head = BytesIO(file.read(_MAX_PICKLE))
    try:
        if read_pickle(head) != _LEGACY_MAGIC:
            raise PickleError("a pickle that torch.save did not write")
        protocol, _, content, keys = (read_pickle(head) for _ in range(4))
        if protocol != _LEGACY_PROTOCOL or not isinstance(keys, list):
            raise PickleError(f"the legacy format in an unknown version, {protocol!r}")
        records = _state_dict(content)
        _check_total(records, size)
        dtypes = {r.storage.key: r.storage.dtype for r in _storages_of(content)}
        offsets: dict[str, tuple[int, int]] = {}  # key: (first byte, values)
        file.seek(head.tell())
        for key in keys:
            count = file.read(8)
            if len(count) < 8:
                raise PickleError(f"truncated: storage {key} begins beyond the file")
            (numel,) = struct.unpack("<q", count)
            dtype = dtypes.get(key)
            if dtype is None or numel < 0:
                raise PickleError(f"a storage {key!r} of {numel} values that no tensor uses")
            offsets[key] = (file.tell(), numel)
            if file.tell() + numel * dtype.itemsize > size:
                raise PickleError(f"truncated: storage {key} ends beyond the file")
            file.seek(numel * dtype.itemsize, 1)

        def read(storage: StorageRecord) -> Tensor:
            start, numel = offsets[storage.key]
            if numel != storage.numel:
                raise PickleError(f"storage {storage.key} of {numel} values, not {storage.numel}")
            file.seek(start)
            return _read_values(file, storage, numel * storage.dtype.itemsize)

        return {name: _tensor(record, name, read) for name, record in records.items()}, (
            "torch legacy"
        )
    except (PickleError, LookupError, TypeError, ValueError, struct.error) as error:
        raise HimoError(f"{path}: not read: {error}") from error


def _read_archive(archive: zipfile.ZipFile, size: int, path: str) -> tuple[dict[str, Tensor], str]:
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
            raise PickleError(f"no record {name}")
        # torch stores what it needs to map. Only a bomb is worth compressing.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise PickleError(f"record {name} is compressed, as torch.save never does")
        if entry.file_size > limit:
            raise PickleError(f"record {name} of {entry.file_size:,} bytes, more than {limit:,}")
        return archive.open(entry), entry.file_size

    if root + "byteorder" in entries:
        record, _ = open_record("byteorder", 16)
        order = record.read()
        if order != b"little":
            raise PickleError(f"byte order {order!r}, expected b'little'")
    record, _ = open_record("data.pkl", _MAX_PICKLE)
    records = _state_dict(read_pickle(BytesIO(record.read())))
    _check_total(records, size)

    def read(storage: StorageRecord) -> Tensor:
        record, length = open_record(f"data/{storage.key}", size)
        if length != storage.numel * storage.dtype.itemsize:
            raise PickleError(
                f"storage {storage.key} of {length:,} bytes, expected {storage.numel:,} values of "
                f"{storage.dtype}"
            )
        return _read_values(record, storage, length)

    container = "torchscript" if root + "constants.pkl" in entries else "torch"
    return {name: _tensor(record, name, read) for name, record in records.items()}, container


def _state_dict(content: Any) -> dict[str, TensorRecord]:
    """The tensors by name: of a state dict, a dict with a "state_dict", or a script module."""
    if isinstance(content, ScriptModule):
        return _flatten(content)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise PickleError(f"a {type(content).__name__}, expected a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, TensorRecord):
            kind = type(value).__name__
            raise PickleError(f"no state dict: {name!r} is a {kind}, expected a tensor")
    return content


def _flatten(module: ScriptModule) -> dict[str, TensorRecord]:
    tensors: dict[str, TensorRecord] = {}
    seen: set[int] = set()
    todo = [("", module, 0)]
    while todo:
        prefix, current, depth = todo.pop()
        if id(current) in seen or depth > _MAX_DEPTH:
            raise PickleError("a module that holds itself, or is held twice")
        seen.add(id(current))
        for name, value in current.attributes.items():
            if isinstance(value, ScriptModule):
                todo.append((f"{prefix}{name}.", value, depth + 1))
            elif isinstance(value, TensorRecord):
                tensors[f"{prefix}{name}"] = value
    return tensors


def _storages_of(content: Any) -> list[TensorRecord]:
    """Every tensor anywhere in content: the flat format tells no dtype but through its tensors."""
    found, seen, todo = [], set(), [content]
    while todo:
        value = todo.pop()
        if isinstance(value, TensorRecord):
            found.append(value)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value.values() if isinstance(value, dict) else value)
    return found


def _check_total(records: dict[str, TensorRecord], size: int) -> None:
    total = sum(math.prod(r.size) * r.storage.dtype.itemsize for r in records.values())
    if total > size:
        raise PickleError(f"tensors of {total:,} bytes declared in a file of {size:,}")


def _tensor(record: TensorRecord, name: str, read: _Reader) -> Tensor:
    steps = zip(record.size, record.stride, strict=True)
    last = record.offset + sum((size - 1) * stride for size, stride in steps)
    if 0 not in record.size and last >= record.storage.numel:
        raise PickleError(
            f"tensor {name} reaches value {last:,} of a storage of {record.storage.numel:,}"
        )
    values = read(record.storage)
    # A copy where the tensor is but a part of its storage, or is not laid out row by row.
    part = values.as_strided(record.size, record.stride, record.offset)
    return part.contiguous() if part.numel() == values.numel() else part.clone()


def _read_values(file: Any, storage: StorageRecord, length: int) -> Tensor:
    values = torch.empty(storage.numel, dtype=storage.dtype)
    if length:
        buffer = values.view(torch.uint8).numpy().data
        done = 0
        while done < length:
            count = file.readinto(buffer[done : done + _BLOCK])
            if not count:
                raise PickleError(f"truncated: storage {storage.key}")
            done += count
    if isinstance(file, zipfile.ZipExtFile) and file.read(1):  # reading to the end checks the CRC
        raise PickleError(f"storage {storage.key} longer than it says")
    return values


def _size(file: BinaryIO) -> int:
    position = file.tell()
    size = file.seek(0, 2)
    file.seek(position)
    return size
