"""Data files with known numbers of good and bad records: every one of them is accounted for.

Each entry writes a data set and says which captions it has and how many records are bad, by reason;
or it is refused as a whole, with words of the message.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from fuzz_corpus import bounded, corpus
from PIL import Image

from himo.data import open_dataset
from himo.errors import HimoError

SECONDS, MEBIBYTES = 2, 64


class Account(NamedTuple):
    path: Path
    good: list[str]  # captions
    bad: dict[str, int]  # records by reason


class Refused(NamedTuple):
    path: Path
    words: str


Entry = Callable[[Path], Account | Refused]
CORPUS: dict[str, Entry] = {}


def entry(name: str) -> Callable[[Entry], Entry]:
    def add(write: Entry) -> Entry:
        assert name not in CORPUS
        CORPUS[name] = write
        return write

    return add


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = _picture()
CAPTIONS = [f"caption {number} of a scene" for number in range(300)]


# csv and tsv. The images of the rows are a.jpg, in the folder of each file.


def _table(
    name: str, lines: dict[int, bytes], good: list[str] | None = None, end: bytes = b"\n"
) -> None:
    """300 rows of a tsv; `lines` replaces some of them, which are bad unless `good` is given."""

    def write(folder: Path) -> Account:
        rows = [f"a.jpg\t{caption}".encode() for caption in CAPTIONS]
        for number, line in lines.items():
            rows[number] = line
        path = folder / "a.tsv"
        path.write_bytes(end.join([b"filepath\ttitle", *rows, b""]))
        left = [caption for number, caption in enumerate(CAPTIONS) if number not in lines]
        return Account(path, left, {reason: len(lines)} if lines else {})

    reason = "encoding" if "encoded" in name or "NUL" in name else "syntax"
    entry(f"tsv, {name}")(write)


_table("a quote that is never closed", {100: b'a.jpg\t"Keep out, says the sign'})
_table("two such quotes", {100: b'a.jpg\t"Keep out', 250: b'a.jpg\t"Private'})
_table("one in the last row", {299: b'a.jpg\t"Keep out'})
_table("one in every second row", dict.fromkeys(range(0, 300, 2), b'a.jpg\t"Keep out'))
_table("one in neighbouring rows", dict.fromkeys(range(40, 60), b'a.jpg\t"Keep out'))
_table("words after a closing quote", {7: b'a.jpg\t"Keep" out'})
_table("a badly encoded caption", {7: b"a.jpg\tcaf\xe9", 8: b"a.jpg\t\xed\xa0\x80"})
_table("a badly encoded caption before a tab", {7: b"a.jpg\tcaf\xe2\x82"})
_table("a NUL", {7: b"a.jpg\ta\0b"})
_table("line ends of Windows", {7: b'a.jpg\t"Keep out'}, end=b"\r\n")
_table("line ends of old Macs", {7: b'a.jpg\t"Keep out'}, end=b"\r")


def _rows(name: str, text: str, good: list[str], bad: dict[str, int]) -> None:
    def write(folder: Path) -> Account:
        path = folder / "a.csv"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        (folder / "1").write_bytes(PICTURE)
        for digits in ("22", "ab3f", "99ce", "feed", "dead"):
            (folder / digits).write_bytes(PICTURE)
        return Account(path, good, bad)

    entry(f"csv, {name}")(write)


_rows(
    "a stray quote that another row closes",
    'filepath,title\na.jpg,"one\na.jpg,two\na.jpg,three"\na.jpg,four\n',
    ["two", 'three"', "four"],
    {"syntax": 1},
)
_rows(
    "captions before images",
    'title,filepath\n"one,a.jpg\ntwo,a.jpg\nthree",a.jpg\n"4, and\nfour",a.jpg\n',
    ["two", 'three"', "4, and four"],
    {"syntax": 1},
)
_rows(
    "a stray quote before quoted captions",
    'filepath,title\na.jpg,"one\na.jpg,"two, too"\na.jpg,"""three"""\na.jpg,four\n',
    ["two, too", '"three"', "four"],
    {"syntax": 1},
)
_rows(
    "images without a suffix",
    'filepath,title\n1,zero\n1,"one\n22,two\n1,three"\n1,"four\nand, five"\n',
    ["zero", "two", 'three"', "four and, five"],
    {"syntax": 1},
)
_rows(
    "images named by digests",
    'filepath,title\nab3f,"one\n99ce,two\nfeed,three"\ndead,four\n',
    ["two", 'three"', "four"],
    {"syntax": 1},
)
_rows(
    "a row with too many fields below a stray quote",
    'filepath,title\na.jpg,"one\na.jpg,two, too\na.jpg,three"\n',
    ['three"'],
    {"syntax": 1, "fields": 1},
)
_rows(
    "captions over several lines",
    'filepath,title,x\na.jpg,"one,\ntwo, and\n\nthree",\na.jpg,"a ""b""\nc",\na.jpg,d,"\n\n"\n',
    ["one, two, and  three", 'a "b" c', "d"],
    {},
)
_rows(
    "a broken caption over several lines",
    'filepath,title\na.jpg,"one\ntwo "and"\nthree"\na.jpg,four\n',
    ["four"],
    {"syntax": 1},
)
_rows(
    "bad bytes where nothing is read",
    "filepath,title,notes\na.jpg,one,\udce9\na.jpg,two,\0\n",
    ["one", "two"],
    {},
)
_rows(
    "a line too long", f"filepath,title\na.jpg,{'x' * (1 << 20)}\na.jpg,b\n", ["b"], {"too_long": 1}
)
_rows(
    "an open quote over the whole file", 'filepath,title\na.jpg,"' + "x\n" * 3000, [], {"syntax": 1}
)
_rows(
    "rows that open and close quotes",
    "filepath,title\n" + 'x","a\n' * 9000,
    [],
    {"syntax": 9000},
)
_rows(
    "rows that open and close quotes, of 2,000 columns",
    "filepath,title" + ",c" * 1998 + "\n" + 'x","a\n' * 3000,
    [],
    {"syntax": 3000},
)


# JSON and JSON lines.


def _json(name: str, text: str, good: list[str], bad: dict[str, int], suffix: str = "json") -> None:
    def write(folder: Path) -> Account:
        path = folder / f"a.{suffix}"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return Account(path, good, bad)

    entry(f"{suffix}, {name}")(write)


def _record(caption: str, more: str = "") -> str:
    return f'{{"image": "a.jpg", "caption": "{caption}"{more}}}'


UNUSED = (
    ', "score": NaN',
    ', "n": ' + "9" * 5000,
    ', "x": 1, "x": 2',
    ', "y": [1, {"z": -Infinity}]',
)
for suffix, joined in (("json", ",\n"), ("jsonl", "\n")):
    records = [_record(f"c{n}", more) for n, more in enumerate(UNUSED)]
    records += [
        _record("d", ', "caption": "e"'),
        _record("caf\udce9"),
        _record("f", ', "a": "\udce9"'),
    ]
    text = joined.join(records)
    _json(
        "fields that are not used",
        f"[{text}]" if suffix == "json" else text,
        ["c0", "c1", "c2", "c3", "f"],
        {"syntax": 1, "encoding": 1},
        suffix,
    )
_json(
    "stray quotes on one line",
    "[" + ", ".join(_record(f'say "{n}' if n in (3, 7) else f"c{n}") for n in range(12)) + "]",
    [f"c{n}" for n in range(12) if n not in (3, 7)],
    {"syntax": 2},
)
_json(
    "a stray quote before other orders of the keys",
    "["
    + ",\n".join(
        [
            '{"caption": "a", "image": "a.jpg"}',
            _record('say "b"'),
            '{"caption": "c", "image": "a.jpg"}',
            _record("d"),
        ]
    )
    + "]",
    ["a", "c", "d"],
    {"syntax": 1},
)
_json(
    "quotes left out",
    "["
    + ",\n".join(_record(f"c{n}").replace("a.jpg" + '"' * (n in (2, 5)), "a.jpg") for n in range(9))
    + "]",
    [f"c{n}" for n in range(9) if n not in (2, 5)],
    {"syntax": 2},
)
_json(
    "stray quotes in many records",
    "[" + ", ".join([_record('say "x')] * 5000 + [_record("a")]) + "]",
    ["a"],
    {"syntax": 5000},
)
_json(
    "bad records with a key of their own",
    "[" + ", ".join([f'{{"k{n}": x}}' for n in range(5000)] + [_record("a")]) + "]",
    ["a"],
    {"syntax": 5000},
)
_json(
    "no line break between files", _record("a") + "\ufeff" + _record("b"), ["a", "b"], {}, "jsonl"
)
_json(
    "broken objects between others on one line",
    _record("a") + _record('say "b"') + _record("c") + " " + _record("d") + '{"image": x}\n',
    ["a", "c", "d"],
    {"syntax": 2},
    "jsonl",
)
_json(
    "many broken objects on one line",
    '{"image": "a}{"' * 60_000 + "\n" + _record("a"),
    ["a"],
    {"syntax": 60_001},
    "jsonl",
)
_json(
    "line ends of old Macs",
    _record("a") + "\r{\r" + _record("b"),
    ["a", "b"],
    {"syntax": 1},
    "jsonl",
)
_json(
    "conversations",
    json.dumps(
        [
            {
                "image": "a.jpg",
                "conversations": [{"from": a, "value": "x"}, {"from": b, "value": "y"}],
            }
            for a, b in (("human", "gpt"), ("gpt", "human"), ("system", "human"), ("user", "Model"))
        ]
    ),
    ["y", "x", "y"],
    {"type": 1},
)


# Shards.


def _tar(files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            if data.startswith(b"->"):
                member.type, member.linkname = tarfile.LNKTYPE, data[2:].decode()
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _without_end(archive: bytes) -> bytes:
    return archive.rstrip(b"\0").ljust(-(-len(archive.rstrip(b"\0")) // 512) * 512, b"\0")


def _pairs(*keys: str, caption: str = "") -> list[tuple[str, bytes]]:
    files = [[(f"{key}.jpg", PICTURE), (f"{key}.txt", f"{caption}{key}".encode())] for key in keys]
    return [file for pair in files for file in pair]


def _shard(name: str, data: bytes, good: list[str], bad: dict[str, int]) -> None:
    def write(folder: Path) -> Account:
        path = folder / "s.tar"
        path.write_bytes(data)
        return Account(path, good, bad)

    entry(f"tar, {name}")(write)


COMPANIONS = [("x.json", b"{}"), ("x.cls", b"1"), ("x.png", PICTURE), ("x.mask.png", PICTURE)]
_shard("companion files", _tar([*COMPANIONS, *_pairs("x"), *_pairs("y")]), ["x", "y"], {})
_shard("a mask alone", _tar([("x.mask.png", PICTURE), *_pairs("x", "y")]), ["x", "y"], {})
_shard("dotted keys", _tar(_pairs("a.v2", "b", "c.v2.1")), ["a.v2", "b", "c.v2.1"], {})
_shard("dotted keys of one sample", _tar(_pairs("a.v1", "a.v2", "b")), ["a.v1", "a.v2", "b"], {})
_shard(
    "dotted images without a caption",
    _tar([*_pairs("a.v1"), ("a.v2.jpg", PICTURE), ("b.v2.jpg", PICTURE), *_pairs("c")]),
    ["a.v1", "c"],
    {"missing_key": 2},
)
_shard("another name of the caption", _tar([("a.jpg", PICTURE), ("a.cap.txt", b"c")]), ["c"], {})
_shard(
    "a mask and no image",
    _tar([("a.avif", b"x"), ("a.mask.png", PICTURE), ("a.txt", b"a"), *_pairs("b")]),
    ["b"],
    {"missing_key": 1},
)
_shard(
    "folders with dots",
    _tar(_pairs("v1.0/a", "v1.0/b", "v1.1/b")),
    ["v1.0/a", "v1.0/b", "v1.1/b"],
    {},
)
_shard("joined", _tar(_pairs("a", "b")) + _tar(_pairs("c")), ["a", "b", "c"], {})
_shard("joined with one key", _tar(_pairs("a")) + _tar(_pairs("a", caption="2")), ["a", "2a"], {})
_shard(
    "joined without an end",
    _without_end(_tar(_pairs("a"))) + _tar(_pairs("a", "b")),
    ["a", "a", "b"],
    {},
)
_shard("zeros in between", _tar(_pairs("a")) + bytes(3 << 20) + _tar(_pairs("b")), ["a", "b"], {})
_shard("cut off between members", _without_end(_tar(_pairs("a", "b"))), ["a", "b"], {"cut_off": 1})
_shard(
    "cut off in a sample", _tar(_pairs("a", "b"))[:4096], ["a"], {"cut_off": 1, "missing_key": 1}
)
_shard("one key twice", _tar([*_pairs("a"), *_pairs("a")]), ["a", "a"], {})
_shard(
    "files of macOS and of no sample",
    _tar(
        [
            ("._a.jpg", b"x"),
            ("a.jpg", PICTURE),
            ("._a.txt", b"x"),
            ("README", b"x"),
            ("a.txt", b"a"),
        ]
    ),
    ["a"],
    {},
)
_shard(
    "webdataset's own files",
    _tar([("__meta__", b"{}"), ("__x__/a.json", b"{}"), *_pairs("a")]),
    ["a"],
    {},
)
_shard(
    "capitals",
    _tar([("a.JPG", PICTURE), ("a.TXT", b"c"), ("b.Jpeg", PICTURE), ("b.Json", b'{"title": "d"}')]),
    ["c", "d"],
    {},
)
_shard(
    "links",
    _tar([*_pairs("a"), ("b.jpg", b"->a.jpg"), ("b.txt", b"->a.txt")]),
    ["a"],
    {"not_a_file": 1},
)
_shard(
    "samples of other formats",
    _tar([*_pairs("a"), ("b.avif", b"x"), ("b.caption", b"x"), ("c.avif", b"x"), ("c.txt", b"c")]),
    ["a"],
    {"missing_key": 2},
)
_shard(
    "badly encoded captions",
    _tar(
        [
            ("a.jpg", PICTURE),
            ("a.txt", b"\xe9"),
            ("b.jpg", PICTURE),
            ("b.txt", "b".encode("utf-16")),
            *_pairs("c"),
        ]
    ),
    ["c"],
    {"encoding": 2},
)
_shard("a byte order mark", _tar([("a.jpg", PICTURE), ("a.txt", b"\xef\xbb\xbfa")]), ["a"], {})
_shard(
    "JSON with NaN",
    _tar(
        [
            ("a.jpg", PICTURE),
            ("a.json", b'{"caption": "a", "similarity": NaN}'),
            ("b.jpg", PICTURE),
            ("b.json", b"{"),
        ]
    ),
    ["a"],
    {"syntax": 1},
)
_shard(
    "names of 300 bytes",
    _tar(_pairs("n" * 280 + ".x", "b"), tarfile.GNU_FORMAT),
    ["n" * 280 + ".x", "b"],
    {},
)


@entry("tar, a hole of a gigabyte between two archives")
def _hole(folder: Path) -> Account:
    path = folder / "s.tar"
    with path.open("wb") as file:
        file.write(_tar(_pairs("a")))
        file.seek(1 << 30)
        file.write(_tar(_pairs("b")))
        file.truncate(1 << 40)
    return Account(path, ["a", "b"], {})


def _refused(name: str, file: str, data: bytes, words: str) -> None:
    def write(folder: Path) -> Refused:
        (folder / file).write_bytes(data)
        return Refused(folder / file, words)

    entry(f"refused, {name}")(write)


SHARD = _tar(_pairs("a", "b"))
_refused("gzip", "s.tar.gz", gzip.compress(SHARD), "compressed (gzip)")
_refused("gzip named tar", "s.tar", gzip.compress(SHARD), "compressed (gzip)")
_refused("tgz", "s.tgz", gzip.compress(SHARD), "compressed (gzip)")
_refused("xz", "s.tar.xz", lzma.compress(SHARD), "compressed (xz)")
_refused("bzip2", "s.tar.bz2", bz2.compress(SHARD), "compressed (bzip2)")
_refused("zstd", "s.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600), "compressed (zstd)")
_refused("a compressed csv", "a.csv", gzip.compress(b"filepath,title\n"), "compressed (gzip)")
_refused(
    "a compressed csv by name", "a.csv.gz", gzip.compress(b"filepath,title\n"), "compressed (gzip)"
)
_refused("compressed lines", "a.jsonl", gzip.compress(_record("a").encode()), "compressed (gzip)")
_refused("garbage after the end", "s.tar", SHARD + b"x" * 512, "wrong checksum")
_refused("cut off", "s.tar", SHARD[:1400], "ends in the middle of a file")
_refused("no archive", "s.tar", b"x" * 5000, "is it an uncompressed tar file?")


@entry("refused, a compressed shard beside others")
def _mixed(folder: Path) -> Refused:
    (folder / "0.tar").write_bytes(SHARD)
    (folder / "1.tar.gz").write_bytes(gzip.compress(SHARD))
    return Refused(folder, "1.tar.gz: is compressed (gzip)")


@entry("folder, files without a partner")
def _folder(folder: Path) -> Account:
    (folder / "sub").mkdir()
    for name in ("a.jpg", "b.v2.jpg", "sub/c.JPG", "d.jpg", "e.avif", "._a.jpg"):
        (folder / name).write_bytes(PICTURE)
    for name in ("a", "b.v2", "sub/c", "e", "f"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "g.jpg").write_bytes(PICTURE)
    (folder / "g.txt").write_bytes("UTF-16".encode("utf-16"))
    return Account(folder, ["a", "b.v2", "sub/c"], {"missing_key": 3, "encoding": 1})


@pytest.mark.parametrize("write", corpus(CORPUS, sample=12))
def test_every_record_is_accounted_for(write: Entry, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    expected = write(folder)
    if expected.path != folder:
        (folder / "a.jpg").write_bytes(PICTURE)

    def opened(limit: float) -> list[str]:
        index = open_dataset(
            expected.path, max_bad_fraction=limit, cache_dir=tmp_path / "cache", progress=False
        )
        for row in range(0, len(index), 50):
            assert index.open_image(row).size == (8, 8)
        if isinstance(expected, Account):
            assert index.report.bad == expected.bad
            assert index.report.total == len(expected.good) + sum(expected.bad.values())
        return [record.caption for record in index]

    with bounded(SECONDS, MEBIBYTES):
        if isinstance(expected, Account) and expected.good:
            assert opened(1.0) == expected.good
        else:
            with pytest.raises(HimoError) as error:
                opened(1.0)
            words = expected.words if isinstance(expected, Refused) else "no sample is left; "
            assert words in str(error.value) and str(error.value).isprintable()
            if isinstance(expected, Account):
                assert f"{sum(expected.bad.values())} bad records" in str(error.value)
    if isinstance(expected, Account) and expected.bad:
        bad, all_of_them = (
            sum(expected.bad.values()),
            len(expected.good) + sum(expected.bad.values()),
        )
        with pytest.raises(HimoError, match=rf"{bad} of {all_of_them} records are bad"):
            opened(bad / all_of_them - 1e-9)
