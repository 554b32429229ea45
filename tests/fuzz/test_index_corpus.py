"""Forged and damaged indexes in the place of a data set's own: rebuilt, or refused in one line.

Each entry gets the path of a whole index and puts something else there. Its header and rows carry
the right checksums, key and stamp, so that nothing but their content tells them from our own.
"""

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_corpus import bounded, corpus
from PIL import Image

from himo.data import SampleIndex, open_dataset
from himo.data.blob_file import DamagedFile
from himo.errors import HimoError
from himo.transforms import ImageError

SECONDS, MEBIBYTES = 2, 64
COUNT = 4
ROW, END = struct.Struct("<qiiiqiqqI"), struct.Struct("<qqI4s")
SECRET = "do not touch"

Forge = Callable[[Path], None]
HEADERS: dict[str, Forge] = {}  # are seen when the index is opened
ROWS: dict[str, Forge] = {}  # are seen when a row is read
PLACES: dict[str, Forge] = {}  # something else at the index's path


def _parts(path: Path) -> tuple[bytes, list[list[int]], dict[str, Any]]:
    """Text, rows and header of an index."""
    data = path.read_bytes()
    offset, length, _, _ = END.unpack(data[-END.size :])
    header = json.loads(data[offset : offset + length])
    rows = [list(row) for row in ROW.iter_unpack(data[header["rows"] : offset])]
    return data[8 : header["rows"]], rows, header


def _write(path: Path, text: bytes, rows: list[list[int]], header: bytes) -> None:
    packed = b""
    for row in rows:
        part = ROW.pack(*row[:-1], 0)[:-4]
        start, length = row[0], sum(row[1:4])
        said = (b"HIMOIDX2" + text)[max(0, start) : max(0, start + length)]
        packed += part + struct.pack("<I", zlib.crc32(part, zlib.crc32(said)))
    body = b"HIMOIDX2" + text + packed
    end = END.pack(len(body), len(header), zlib.crc32(header), b"IDX1")
    path.write_bytes(body + header + end)


def _header(name: str, change: Callable[[dict[str, Any]], object]) -> None:
    def forge(path: Path) -> None:
        text, rows, header = _parts(path)
        changed = change(header)
        changed = header if changed is None else changed
        _write(
            path,
            text,
            rows,
            changed if isinstance(changed, bytes) else json.dumps(changed).encode(),
        )

    HEADERS[name] = forge


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


_header("no object", lambda header: [1])
_header("null", lambda header: b"null")
_header("no JSON", lambda header: b"{")
_header("empty", lambda header: b"")
_header("not UTF-8", lambda header: b'{"key": "\xff"}')
_header("UTF-16", lambda header: json.dumps(header).encode("utf-16"))
_header("nested", lambda header: b"[" * 100_000)
_header("nested objects", lambda header: b'{"key":' * 50_000)
_header("endless number", lambda header: b'{"key": ' + b"9" * 5000 + b"}")
_header("three megabytes", lambda header: b'"' + b"x" * (3 << 20) + b'"')
_header("a key is missing", lambda header: header.pop("stamp") and None)
_header("a key more", _set("shards", value=["/etc/passwd"]))
_header("image root", lambda header: header | {"image_root": "/", "follow_links": True})
_header("rows is a text", _set("rows", value="8"))
_header("rows is null", _set("rows", value=None))
_header("rows is a fraction", lambda header: header | {"rows": float(header["rows"])})
_header("rows is true", _set("rows", value=True))
_header("rows is negative", _set("rows", value=-ROW.size))
_header("rows is huge", _set("rows", value=10**300))
_header("rows is NaN", _set("rows", value=float("nan")))
_header("no report", _set("report", value=None))
_header("report is a list", _set("report", value=[]))
_header("a field of the report is missing", lambda header: header["report"].pop("bad") and None)
_header("a field of the report more", _set("report", "source", value="/etc/passwd"))
_header("records is a text", _set("report", "records", value="4"))
_header("records is negative", _set("report", "records", value=-1))
_header("records is huge", _set("report", "records", value=10**30))
_header("records is 0", _set("report", "records", value=0))
_header("records is 5", _set("report", "records", value=5))
_header("bad is a list", _set("report", "bad", value=[1]))
_header("bad counts texts", _set("report", "bad", value={"a": "b"}))
_header("bad without examples", _set("report", "bad", value={"a": 3}))
_header("bad is endless", _set("report", "bad", value={"a": 10**400}))
_header("more bad than records", lambda h: h["report"].update(bad={"a": 9}, bad_examples=["x"] * 5))
_header("examples are numbers", _set("report", "bad_examples", value=[1]))
_header("missing is a number", _set("report", "missing", value=1))
_header("missing has one number", _set("report", "missing", value={"a": [1]}))
_header("missing of none", _set("report", "missing", value={"a": [1, 0]}))
_header("missing examples", _set("report", "missing_examples", value=["/etc/passwd", "../../x"]))
_header("ignored is a text", _set("report", "ignored", value="x"))
_header("sha256 is null", _set("report", "sha256", value=None))
_header("key is a list", _set("key", value=[]))
_header("another stamp", _set("stamp", value="x"))


def _row(name: str, at: int, value: int) -> None:
    def forge(path: Path) -> None:
        text, rows, header = _parts(path)
        rows[1][at] = value
        _write(path, text, rows, json.dumps(header).encode())

    ROWS[name] = forge


def _text(name: str, field: int, change: Callable[[bytes], bytes]) -> None:
    def forge(path: Path) -> None:
        text, rows, header = _parts(path)
        start = rows[1][0] - 8 + sum(rows[1][1:field])
        length = rows[1][field]
        said = change(text[start : start + length]).ljust(length, b".")[:length]
        text = text[:start] + said + text[start + length :]
        _write(path, text, rows, json.dumps(header).encode())

    ROWS[name] = forge


_row("text before the file", 0, -100)
_row("text in the magic", 0, 0)
_row("text beyond the file", 0, 1 << 40)
_row("the largest offset", 0, (1 << 63) - 1)
_row("a negative path", 1, -5)
_row("a negative caption", 2, -5)
_row("a path of 2 GiB", 1, (1 << 31) - 1)
_row("an empty caption", 2, 0)
_row("a caption over the rows", 3, 300)
_row("shard -2", 5, -2)
_row("offset -1", 6, -1)
_row("size -1", 7, -1)
_row("a size of an exbibyte", 7, 1 << 60)
_text("path not UTF-8", 1, lambda text: b"\xff")
_text("caption not UTF-8", 2, lambda text: b"\xff")
_text("NUL in a caption", 2, lambda text: b"a\0b")
_text("a path out of the root", 1, lambda text: b"../s.png")
_text("an absolute path", 1, lambda text: b"/etc/os")


def _place(name: str) -> Callable[[Forge], Forge]:
    def add(forge: Forge) -> Forge:
        def replace(path: Path) -> None:
            path.unlink()
            forge(path)

        PLACES[name] = replace
        return forge

    return add


_place("a link to a file")(lambda path: path.symlink_to(path.parent.parent / "secret"))
_place("a link to nothing")(lambda path: path.symlink_to(path.parent.parent / "new"))
_place("a link to itself")(lambda path: path.symlink_to(path))
_place("a link to a directory")(lambda path: path.symlink_to(path.parent.parent))
_place("a link to a device")(lambda path: path.symlink_to("/dev/zero"))
_place("a FIFO")(os.mkfifo)
_place("a hard link")(lambda path: os.link(path.parent.parent / "secret", path))
_place("nothing")(lambda path: None)
_place("an empty file")(lambda path: path.write_bytes(b"") and None)
_place("zeros")(lambda path: path.write_bytes(bytes(1 << 16)) and None)
_place("the last version")(lambda path: path.write_bytes(b"HIMOIDX1" + bytes(100)) and None)


@_place("a link to another index")
def _link_to_index(path: Path) -> None:
    other = path.parent.parent / "other"
    other.mkdir(exist_ok=True)
    (other / "a.jsonl").write_text('{"image": "b.png", "caption": "forged"}')
    Image.new("RGB", (8, 8)).save(other / "b.png")
    path.symlink_to(open_dataset(other / "a.jsonl").path)


@_place("a socket")
def _socket(path: Path) -> None:
    folder = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is at most 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(folder)


@_place("a sparse file of a tebibyte")
def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"HIMOIDX2")
        file.seek((1 << 40) - END.size)
        file.write(END.pack(8, (1 << 40) - 8 - END.size, 0, b"IDX1"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four pictures with captions, their index next to them, and a secret beyond the root."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(COUNT):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"caption {number}"}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "secret").write_text(SECRET)
    Image.new("RGB", (3, 3)).save(tmp_path / "s.png")
    return folder / "a.jsonl"


def _whole(index: SampleIndex, source: Path) -> None:
    assert [record.caption for record in index] == [f"caption {n}" for n in range(COUNT)]
    assert [index.open_image(row).size for row in range(COUNT)] == [(8, 8)] * COUNT
    assert index.report.source == str(source) and index.report.bad == {}
    assert not os.path.islink(index.path) and os.path.isfile(index.path)
    root = source.parent.parent
    assert (root / "secret").read_text() == SECRET
    assert sorted(set(os.listdir(root)) - {"other"}) == ["data", "s.png", "secret"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("forge", corpus(HEADERS | PLACES, sample=8))
def test_what_is_no_index_is_built_anew(forge: Forge, source: Path) -> None:
    path = Path(open_dataset(source).path)
    forge(path)
    with bounded(SECONDS, MEBIBYTES):
        try:
            alone = SampleIndex(path)
        except DamagedFile as error:
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        else:
            assert alone.key != "" and [record.line for record in alone]
            with pytest.raises(HimoError, match="opened without its data set"):
                alone.open_image(0)
        _whole(open_dataset(source), source)
    _whole(open_dataset(source), source)


@pytest.mark.parametrize("forge", corpus(ROWS))
def test_a_forged_row_is_one_line_or_a_bad_image(forge: Forge, source: Path) -> None:
    path = Path(open_dataset(source).path)
    forge(path)
    with bounded(SECONDS, MEBIBYTES):
        index = open_dataset(source)
        assert index[0].caption == "caption 0" and index.open_image(2).size == (8, 8)
        with pytest.raises((DamagedFile, ImageError)) as error:
            index.open_image(1)
    assert str(error.value).isprintable()
    path.unlink()
    _whole(open_dataset(source), source)


def test_an_index_that_is_cut_off_while_it_is_open_is_one_line(source: Path) -> None:
    index = open_dataset(source)
    os.truncate(index.path, 20)
    with pytest.raises(DamagedFile, match=r"is cut off; remove it to have the index built again"):
        index[0]


def test_a_directory_in_its_place_is_refused(source: Path) -> None:
    path = Path(open_dataset(source).path)
    path.unlink()
    path.mkdir()
    with pytest.raises(HimoError, match=r"himo-index: cannot be written: is a directory"):
        open_dataset(source)
    assert os.listdir(path.parent).count(path.name) == 1
    assert not list(path.parent.glob(".himo-*"))
