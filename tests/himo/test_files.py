"""Atomic writes, digests and the reading of regular files, by the files on the disk afterwards."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest
from fresh_process import run_python

from himo.errors import HimoError
from himo.files import atomic_path, hidden_path, open_regular, sha256_file


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".himo-")]


def test_the_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert leftovers(tmp_path) == []


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError("not of himo")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_its_own(
    tmp_path: Path, umask: int
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.touch()
    old.chmod(0o604)
    before = os.umask(umask)
    try:
        for target in (old, new):
            with atomic_path(target) as temporary:
                temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(old.stat().st_mode) == 0o604
    assert stat.S_IMODE(new.stat().st_mode) == 0o666 & ~umask


def test_a_symlink_is_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target, link = elsewhere / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        assert temporary.parent == elsewhere
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/file", "no such file or directory"),
        ("directory", "is a directory"),
        ("fifo", "not a regular file"),
        ("file/below", "not a directory"),
        ("nul\0", "embedded null byte"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    path = f"{tmp_path}/{name}"
    with pytest.raises(HimoError) as error, atomic_path(path):
        pytest.fail("the body ran")
    assert reason in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert leftovers(tmp_path) == []


def test_what_the_disk_cannot_hold_is_refused_before_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(HimoError) as error, atomic_path(target, needed=1 << 60):
        pytest.fail("the body ran")
    assert f"{1 << 60:,} bytes" in str(error.value)
    assert "bytes free" in str(error.value)
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


# Writes a second, larger version of a file under a limit, and prints the error.
_WRITE = """
import resource, sys
from himo.errors import HimoError
from himo.files import atomic_path
path, size, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for _ in range(size >> 16):
            file.write(bytes(1 << 16))
except HimoError as error:
    print(error)
"""


def test_a_file_size_limit_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    message = run_python("-c", _WRITE, str(target), str(1 << 20), str(100_000))
    assert message.startswith(f"{target}: not written, file too large: needs more than ")
    assert "bytes free" in message
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_an_error_that_names_the_file(small_disk: Path) -> None:
    target = small_disk / "file"
    target.write_text("old")
    message = run_python("-c", _WRITE, str(target), str(4 << 20), "0")
    assert message.startswith(f"{target}: not written, no space left on device: needs more than ")
    assert "bytes free; any earlier file is unchanged" in message
    assert target.read_text() == "old"
    assert leftovers(small_disk) == []


def test_a_failure_without_a_name_is_of_the_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    # EIO is what a failing disk gives; a library may give no number.
    for failure, reason in (
        (OSError(errno.EIO, os.strerror(errno.EIO)), "input/output error"),
        (OSError("2944 requested and 2016 written"), "2944 requested and 2016 written"),
    ):
        with pytest.raises(HimoError) as error, atomic_path(target):
            raise failure
        assert str(error.value) == f"{target}: cannot be written: {reason}"
    # Of another file, or of a pipe whose reader has gone.
    for other in (FileNotFoundError(errno.ENOENT, "no", "other"), BrokenPipeError(errno.EPIPE, "")):
        with pytest.raises(type(other)), atomic_path(target):
            raise other
    assert target.read_text() == "old" and leftovers(tmp_path) == []


def test_a_hidden_path_is_new_each_time(tmp_path: Path) -> None:
    assert len({hidden_path(tmp_path) for _ in range(100)}) == 100


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
def test_the_digest_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", "no such file or directory"),
        ("directory", "is a directory"),
        ("fifo", "not a regular file"),
        ("link to a fifo", "not a regular file"),
        ("link to itself", "too many levels of symbolic links"),
        ("link to a device", "not a regular file"),
        ("nul\0", "embedded null byte"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link to a fifo").symlink_to(tmp_path / "fifo")
    (tmp_path / "link to itself").symlink_to(tmp_path / "link to itself")
    (tmp_path / "link to a device").symlink_to("/dev/zero")
    with pytest.raises(HimoError) as error, open_regular(f"{tmp_path}/{name}"):
        pytest.fail("it was opened")
    assert f"cannot be read: {reason}" in str(error.value)


def test_a_symlink_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"content"


def test_an_error_is_one_printable_line() -> None:
    error = HimoError("a\nb\r\x1b[31mc\u202ed\udcff é 名")
    assert str(error) == r"a\nb\r\x1b[31mc\u202ed\udcff é 名"
