"""Reads and writes safetensors files; those that himo writes carry a SHA-256.

The format (https://github.com/huggingface/safetensors#format) has no checksum, so a flipped bit
goes unnoticed. himo stores the SHA-256 of the file in the header's metadata, computed with zeros
for its own 64 digits. A file of himo without it is refused; other files may lack it.
"""

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from io import BufferedRandom, BufferedReader
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from himo.checkpoint.strict_json import require_no_duplicates
from himo.errors import HimoError, quoted, shortened
from himo.files import atomic_path, hidden_directory, lock

DIGEST = "himo_sha256"
MAX_TENSORS = 20_000  # of a file of any format; the largest training state has a quarter of it
MAX_DIMENSIONS = 8
_OWN_PREFIX = "himo_"  # of the metadata keys that himo writes
_MAX_HEADER = 4 << 20  # bytes; a thousand tensors take 150 kB
_NO_DIGEST = "0" * 64
_DIGEST_PATTERN = re.compile(b'"' + DIGEST.encode() + b'" *: *"([0-9a-f]{64})"')
_MAX_CAUSE = 200  # characters of a message of the library
_BLOCK = 8 << 20  # bytes hashed at a time
_OS_ERROR = re.compile(r"os error (\d+)")  # in a message of the library: the errno
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


def read_safetensors(file: BufferedReader, path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file; its digest, if it has one, is checked.

    The header's size is checked before the library reads it, and each tensor's dtype and shape
    before the tensor is read.

    Raises:
        HimoError: names the file and what is wrong with it.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        raise HimoError(
            f"{path}: damaged: a safetensors header of {length:,} bytes in a file of {size:,}"
        )
    header = file.read(length)
    try:
        require_no_duplicates(header)  # the library would take the last one
        # By its descriptor: the path may be another file by now.
        with safe_open(f"/dev/fd/{file.fileno()}", "pt", backend="pread") as content:
            metadata = content.metadata() or {}
            _check_digest(file, header, metadata)
            tensors = _tensors(content)
    # RuntimeError, TypeError: torch refuses a shape.
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise HimoError(f"{path}: damaged: {_cause(error)}") from error
    return tensors, metadata


def write_safetensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Writes a safetensors file atomically with its digest in the metadata; returns the digest.

    The same tensors and metadata give the same bytes. Tensors that share memory are copied.

    Raises:
        HimoError: there is no space, the directory is missing or read-only, or the tensors and
            metadata are more than `read_safetensors` would read.
    """
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    if len(apart) > MAX_TENSORS:
        raise HimoError(f"{path}: {len(apart):,} tensors, expected at most {MAX_TENSORS:,}")
    needed = sum(tensor.nbytes for tensor in apart.values())
    # The library's file replaces the temporary one, so it needs a lock of its own.
    with ExitStack() as locked, atomic_path(path, needed=needed) as temporary:
        descriptor = _save(apart, temporary, {**metadata, DIGEST: _NO_DIGEST})
        locked.callback(os.close, descriptor)
        return _store_digest(temporary, path)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> int:
    """Replaces a file by one of the same mode from the library; returns a descriptor that locks it.

    The library writes in a hidden directory next to it, because the library's own temporary file
    has a name that `remove_abandoned` does not know.
    """
    with hidden_directory(path.parent) as folder:
        written = folder / path.name
        try:
            save_file(tensors, written, metadata)
        except SafetensorError as error:
            if found := _OS_ERROR.search(str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise
        descriptor = os.open(written, os.O_RDONLY | os.O_CLOEXEC)
        lock(descriptor)
        os.chmod(written, stat.S_IMODE(path.stat().st_mode))
        os.replace(written, path)
    return descriptor


def _check_digest(file: BufferedReader, header: bytes, metadata: Mapping[str, str]) -> None:
    """Raises ValueError for a wrong digest, or a file of himo without one."""
    if DIGEST not in metadata:
        if any(key.startswith(_OWN_PREFIX) for key in metadata):
            raise ValueError(f"himo wrote it, but its {DIGEST} is gone")
        return
    place = _find_digest(header)
    file.seek(8 + len(header))
    found = _digest(header[: place.start] + _NO_DIGEST.encode() + header[place.stop :], file)
    if found != metadata[DIGEST]:
        raise ValueError(f"its SHA-256 is {found}, expected {quoted(metadata[DIGEST])}")


def _tensors(content: safe_open) -> dict[str, Tensor]:
    names = content.offset_keys()
    if len(names) > MAX_TENSORS:
        raise ValueError(f"{len(names):,} tensors, expected at most {MAX_TENSORS:,}")
    for name in names:
        entry = content.get_slice(name)
        shape, dtype = entry.get_shape(), entry.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(f"{quoted(name)} has the dtype {dtype}, which no CLIP has")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"{quoted(name)} has {len(shape):,} dimensions")
    return {name: content.get_tensor(name) for name in names}


def _store_digest(temporary: Path, path: str) -> str:
    """Sorts a file's metadata, whose order the library leaves open, and writes its digest.

    Neither changes the length of the header.
    """
    with open(temporary, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise HimoError(
                f"{path}: metadata and names of {length:,} bytes, expected at most {_MAX_HEADER:,}"
            )
        content = json.loads(file.read(length))
        content["__metadata__"] = dict(sorted(content["__metadata__"].items()))
        header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        header = header.ljust(length)
        assert len(header) == length
        digest = _digest(header, file)
        place = _find_digest(header)
        file.seek(8)
        file.write(header[: place.start] + digest.encode() + header[place.stop :])
    return digest


def _digest(header: bytes, file: BufferedReader | BufferedRandom) -> str:
    """The SHA-256 of a file from its header and its data; the file's position is the data's."""
    digest = hashlib.sha256(struct.pack("<Q", len(header)) + header)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _find_digest(header: bytes) -> slice:
    places = [slice(*match.span(1)) for match in _DIGEST_PATTERN.finditer(header)]
    if len(places) != 1:
        raise ValueError(f"expected one {DIGEST} in the metadata, of 64 digits")
    return places[0]


def _cause(error: Exception) -> str:
    """The first line of the library's message, shortened: it may quote a long name."""
    text = str(error).partition("\n")[0].removeprefix("Error while deserializing header: ")
    return shortened(text, _MAX_CAUSE)
