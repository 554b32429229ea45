"""Atomic writes, digests, and reads of regular files only."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from himo.errors import HimoError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = re.compile(r"\.himo-[0-9a-f]{16}\.tmp")  # the names of hidden_path


@contextmanager
def atomic_path(
    path: str | os.PathLike[str], *, needed: int | None = None, follow_links: bool = True
) -> Iterator[Path]:
    """Yields the path of an empty temporary file that becomes `path` if the body succeeds.

    The temporary file lies in the directory of `path`, which has to exist. On success it is
    flushed to the disk and renamed, so that `path` is always the old file or all of the new one,
    even after a power cut. On failure it is removed and `path` is unchanged.
    A killed process leaves at most a `.himo-*.tmp` file, which `remove_abandoned` removes.
    The mode is the replaced file's, or 0666 less the umask.

    Args:
        path: the file to write.
        needed: bytes it will take, if known. Too little free space is refused before writing.
        follow_links: writes the target of a symlink. False replaces the link itself: for a file
            that the user did not name, in a directory where anyone may have put a link.

    Raises:
        HimoError: the directory is missing or not writable, `path` is not a regular file, there
            is no space for it (disk, quota or file size limit), or writing fails.
    """
    try:
        target = Path(os.path.realpath(path) if follow_links else os.path.abspath(path))
        mode = None
        if follow_links and target.exists():
            mode = stat.S_IMODE(_regular(target).st_mode)
        elif target.is_dir() and not target.is_symlink():
            raise OSError("is a directory")
        flags = os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_RDWR
        temporary, descriptor = _make_locked(target.parent, lambda new: os.open(new, flags, 0o666))
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
        # Without a file's name, and none of a pipe or socket: of the file that is being written.
        is_nameless = isinstance(error, OSError) and error.filename is None
        if cause is None and is_nameless and not isinstance(error, ConnectionError):
            raise HimoError(f"{path}: cannot be written: {os_reason(error)}") from error
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


def output_path(out: str | os.PathLike[str], *suffixes: str) -> Path:
    """The file of --out, which this checks before an hour of work.

    Raises:
        HimoError: its suffix is none of those given, or it cannot be written.
    """
    path = Path(out)
    if suffixes and path.suffix not in suffixes:
        raise HimoError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise HimoError(f"--out {out}: cannot be written")
    return path


def keep_inputs(
    given: str, outputs: Iterable[Path], reads: Iterable[str | os.PathLike[str]]
) -> None:
    """Checks that a command replaces no file that it reads.

    Args:
        given: what names the outputs in the message, as "--out FILE".
        outputs: files that the command writes.
        reads: files that it reads; names of anything else are ignored.

    Raises:
        HimoError: an output is one of the files.
    """
    there = [path for path in outputs if path.exists()]
    for read in filter(os.path.isfile, reads):
        if any(path.samefile(read) for path in there):
            raise HimoError(f"{given}: expected another name: would overwrite {read}")


def json_value(data: bytes) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def os_reason(error: BaseException) -> str:
    """The reason why a file could not be opened, read or written, as the end of a message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text[:1].lower() + text[1:]


def remove_abandoned(directory: str | os.PathLike[str]) -> tuple[int, int]:
    """Removes the temporary files of killed writers; returns (files, bytes).

    Removes only regular files and directories with a name of `hidden_path` that no process has
    locked. Without locks in the file system nothing is removed. No link is followed.
    """
    files = size = 0
    with suppress(OSError):
        for name in os.listdir(directory):
            if _TEMPORARY.fullmatch(name) is None:
                continue
            path = os.path.join(directory, name)
            with suppress(OSError):  # in use, no regular file, not ours, or gone meanwhile
                descriptor = os.open(path, os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
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
    """Yields a new directory, locked while its writer lives; removes it afterwards if still there.

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
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """Opens a regular file for reading bytes; symlinks are followed.

    A FIFO, a device or a directory is refused; a FIFO without waiting for a writer.

    Raises:
        HimoError: the file is missing, not regular, or cannot be read.
    """
    with open(regular_descriptor(path), "rb") as file:
        try:
            yield file
        except OSError as error:  # a failing disk, or a file of /proc
            if error.errno is None:  # raised by a decoder, not by the system
                raise
            raise HimoError(f"{path}: cannot be read: {os_reason(error)}") from error


def regular_descriptor(path: str | os.PathLike[str], *, follow_links: bool = True) -> int:
    """A descriptor for reading a regular file; see `open_regular`."""
    try:
        # Checked before it is opened, because opening a device may act on it. Opened with
        # O_NONBLOCK and checked again, because it may change in between.
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
    """An unused path in directory for a temporary file, which is renamed when it is whole."""
    return Path(directory) / f".himo-{secrets.token_hex(8)}.tmp"


def free_bytes(directory: str | os.PathLike[str]) -> int:
    """Bytes that this user may still write to the file system of `directory`."""
    return shutil.disk_usage(directory).free


def _make_locked(directory: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A new path, and the descriptor that locks it while its writer lives."""
    while True:
        path = hidden_path(directory)
        descriptor = make(path)
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)  # removed as abandoned before it was locked


def _regular(path: str | os.PathLike[str], follow_links: bool = True) -> os.stat_result:
    status = os.stat(path, follow_symlinks=follow_links)
    if stat.S_ISDIR(status.st_mode):
        raise OSError("is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return status


def _no_space(error: BaseException | None) -> OSError | None:
    """The first error in the chain of causes that says that the disk is full."""
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
