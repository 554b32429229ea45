"""Files that are either whole or absent: atomic writes, digests, and reading regular files only."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from himo.errors import HimoError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 1 << 20  # bytes read at a time
_WITHOUT_WAITING = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"\.himo-[0-9a-f]{16}\.tmp")  # the names of hidden_path


@contextmanager
def atomic_path(
    path: str | os.PathLike[str], *, needed: int | None = None, follow_links: bool = True
) -> Iterator[Path]:
    """Yields the path of an empty temporary file that becomes `path` if the body succeeds.

    The temporary file lies in the directory of `path`, which has to exist. On success it is
    flushed to the disk and renamed, so that at every moment, a power cut included, `path` is
    what it was before or all of the new file. On failure it is removed and `path` is untouched.
    A process that is killed leaves at most a `.himo-*.tmp` file behind, for `remove_abandoned`.
    The mode is that of the file replaced, or what the umask leaves of 0666.

    Args:
        path: the file to write.
        needed: bytes it will take, where known: for the message, and to refuse before writing
            what the free space cannot hold.
        follow_links: writes the target of a symlink. Otherwise whatever is there but a directory
            is replaced itself: for a file whose name the user did not give, in a directory where
            anyone may have put a link of that name.

    Raises:
        HimoError: the directory is missing or not writable, `path` is not a regular file, or
            there is no space for it (disk, quota or file size limit).
    """
    try:
        target = Path(os.path.realpath(path) if follow_links else os.path.abspath(path))
        mode = None
        if follow_links and target.exists():
            mode = stat.S_IMODE(_regular(target).st_mode)
        elif target.is_dir() and not target.is_symlink():
            raise OSError("is a directory")
        temporary, descriptor = _temporary_file(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise HimoError(f"{path}: cannot be written: {os_reason(error)}") from error
    try:
        if needed is not None and needed > free_bytes(target.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary
        _flush(temporary)
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except Exception as error:
        cause = _no_space(error)
        if cause is None:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        wanted = f"{needed:,} bytes" if needed is not None else f"more than {size:,} bytes"
        free = f"{free_bytes(target.parent):,} bytes free"
        raise HimoError(
            f"{path}: not written, {os_reason(cause)}: needs {wanted}, {free}; "
            "any earlier file is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)
    _flush(target.parent)  # the rename itself


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file in UTF-8, whole or not at all; HimoError as `atomic_path`."""
    data = text.encode("utf-8", errors="replace")  # a lone surrogate of JSON has no bytes
    with atomic_path(path, needed=len(data)) as temporary:
        temporary.write_bytes(data)


def json_value(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, with a byte order mark or without.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def os_reason(error: BaseException) -> str:
    """Why a file could not be opened, read or written, as the end of a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def remove_abandoned(directory: str | os.PathLike[str]) -> tuple[int, int]:
    """Removes the temporary files of writers that were killed; returns (files, bytes).

    Only regular files and directories under a name of `hidden_path` whose lock nobody holds: where
    the file system has no locks, nothing is removed. No link is followed.
    """
    files = size = 0
    with suppress(OSError):
        for name in os.listdir(directory):
            if _TEMPORARY.fullmatch(name) is None:
                continue
            path = os.path.join(directory, name)
            with suppress(OSError):  # in use, no regular file, not ours, or gone meanwhile
                descriptor = os.open(path, _WITHOUT_WAITING | os.O_RDONLY)
                try:
                    status = os.fstat(descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if stat.S_ISREG(status.st_mode):
                        os.unlink(path)
                        files, size = files + 1, size + status.st_size
                    elif stat.S_ISDIR(status.st_mode):
                        inside = [file.lstat().st_size for file in Path(path).iterdir()]
                        shutil.rmtree(path)
                        files, size = files + len(inside), size + sum(inside)
                finally:
                    os.close(descriptor)
    return files, size


@contextmanager
def hidden_directory(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new directory, locked while its writer lives and removed in the end if still there.

    Raises:
        OSError: it cannot be made.
    """

    def make(path: Path) -> int:
        path.mkdir()
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    path, descriptor = _make_locked(Path(parent), make)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def lock(descriptor: int) -> None:
    """Tells `remove_abandoned` that a temporary file is in use, until the descriptor is closed."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a regular file as 64 hexadecimal digits; HimoError where there is none."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Opens a regular file for reading bytes; symlinks are followed.

    A FIFO, a device or a directory is refused without waiting for a writer.

    Raises:
        HimoError: the file is missing, not regular, or cannot be read.
    """
    with open(regular_descriptor(path), "rb") as file:
        try:
            yield file
        except OSError as error:  # a failing disk, or a file of /proc that is regular in name
            if error.errno is None:  # not the system's: a decoder's word for what it read
                raise
            raise HimoError(f"{path}: cannot be read: {os_reason(error)}") from error


def regular_descriptor(path: str | os.PathLike[str], *, follow_links: bool = True) -> int:
    """A descriptor of a regular file for reading, as `open_regular` opens it."""
    try:
        # Looked at before it is opened, because opening a device may act on it; and O_NONBLOCK
        # with a second look at what was opened, because it may change in between.
        _regular(path, follow_links)
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("not a regular file")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise HimoError(f"{path}: cannot be read: {os_reason(error)}") from error
    return descriptor


def hidden_path(directory: str | os.PathLike[str]) -> Path:
    """A path in directory that no file has yet, for one that is renamed when it is whole."""
    return Path(directory) / f".himo-{secrets.token_hex(8)}.tmp"


def free_bytes(directory: str | os.PathLike[str]) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    return shutil.disk_usage(directory).free


def _temporary_file(directory: Path) -> tuple[Path, int]:
    flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_RDWR
    return _make_locked(directory, lambda path: os.open(path, flags, 0o666))


def _make_locked(directory: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new path, and the descriptor through which it is locked while its writer lives."""
    while True:
        path = hidden_path(directory)
        descriptor = make(path)
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # taken for abandoned before it was locked


def _regular(path: str | os.PathLike[str], follow_links: bool = True) -> os.stat_result:
    status = os.stat(path, follow_symlinks=follow_links)
    if stat.S_ISDIR(status.st_mode):
        raise OSError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status


def _no_space(error: BaseException | None) -> OSError | None:
    """The error that says the disk is full, among `error` and what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return error
        error = error.__cause__ or error.__context__
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
