"""Two thousand damaged annotation files, and damaged shards and indexes (promise G22)."""

import json
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from captioned_files import (
    read,
    sharegpt4v_record,
    write_csv,
    write_images,
    write_jsonl,
    write_tar,
)
from torch import Generator, randint

from himo.data import SampleIndex, open_dataset
from himo.data.jsonl import JsonLines
from himo.data.records import Source
from himo.data.sharegpt4v import ShareGPT4V
from himo.data.table import Table
from himo.data.webdataset import WebDataset
from himo.errors import HimoError

# For each document. Of processor time: that other processes leave less of it is not the reader.
SECONDS, MEBIBYTES = 2.0, 200

TOKENS = [
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
    b"\r",
    b"\n",
    b'"',
    b"'",
    b"\\",
    b"\\ud800",
    b"\\u0000",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"\t",
    b":",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"null",
    b"9" * 5000,
    b"-" * 50,
    b'{"image": "a", "image": "b", "caption": "c"}',
    b'{"a":' * 3000,
    b"[" * 100_000,
    b"]" * 1000,
    b'"' * 999,
    b"\\" * 1001,
    b"x" * 200_000,
    b'"x\n' * 2000,
    b"\xf0\x9f\x90",
    b"\xed\xa0\x80",
    "\u2028\x85".encode(),
]

ROWS = [(f"images/{i}.png", f'A "cat", a dog\tand {i} birds. 猫') for i in range(6)]


def _text(form: str) -> bytes:
    records = [sharegpt4v_record(*row) for row in ROWS]
    if form == "json":
        return json.dumps(records, indent=1, ensure_ascii=False).encode()
    if form == "jsonl":
        return "\n".join(json.dumps({"image": i, "caption": c}) for i, c in ROWS).encode()
    separator = "," if form == "csv" else "\t"
    rows = [("filepath", "title"), *((i, c.replace('"', '""')) for i, c in ROWS)]
    return "\n".join(f'{i}{separator}"{c}"' for i, c in rows).encode()


FORMATS: dict[str, Callable[[Path], Source]] = {
    "json": ShareGPT4V,
    "jsonl": JsonLines,
    "csv": Table,
    "tsv": Table,
}


def _damage(data: bytes, rng: random.Random, tokens: list[bytes]) -> bytes:
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(len(data) + 1)
        end = min(len(data), place + rng.choice([1, 3, 40]))
        kind = rng.randrange(6)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + data[end:]
        elif kind == 2:
            data = data[:place] + data[place:end] * rng.choice([2, 50]) + data[end:]
        elif kind == 3:
            data = data[:place] + rng.randbytes(end - place) + data[end:]
        else:
            data = data[:place] + rng.choice(tokens) + data[place:]
    return data


def _random(generator: Generator) -> random.Random:
    return random.Random(int(randint(2**31, (1,), generator=generator)))


def _peak_mebibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_annotations_are_errors_or_counted(
    form: str, tmp_path: Path, generator: Generator
) -> None:
    rng, text = _random(generator), _text(form)
    path = tmp_path / f"a.{form}"
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, slowest, refused, counted, good = _peak_mebibytes(), 0.0, 0, 0, 0

    for number in range(500):
        damaged = _damage(text, rng, TOKENS)
        path.write_bytes(damaged)
        start = time.process_time()
        try:
            records, bad = read(FORMATS[form](path))
        except HimoError as error:
            refused += 1
            assert str(error).startswith(f"{path}:") and str(error).isprintable()
        except BaseException as error:
            raise AssertionError(f"document {number}: {damaged[:2000]!r}") from error
        else:
            counted += len(bad)
            good += len(records)
            for item in bad:
                assert item.message.startswith(f"{path}:") and len(item.message) < 1000
            for record in records:
                (record.image + record.caption).encode()
                assert record.image and record.caption and "\0" not in record.caption
        slowest = max(slowest, time.process_time() - start)

    grown = _peak_mebibytes() - before
    print(f"{refused} refused, {counted} bad records, {good} good; {slowest:.2f} s, +{grown} MiB")
    assert slowest < SECONDS and grown < MEBIBYTES
    assert good > 300 and refused + counted > 300


def test_damaged_annotations_build_a_whole_index_or_none(
    tmp_path: Path, generator: Generator
) -> None:
    write_images(tmp_path, 6)
    rng, cache = _random(generator), tmp_path / "cache"
    built = 0
    for number in range(120):
        form = list(FORMATS)[number % 4]
        path = tmp_path / f"{number}.{form}"
        path.write_bytes(_damage(_text(form).replace(b"images/", b"images/00"), rng, TOKENS))
        try:
            index = open_dataset(path, max_bad_fraction=0.9, cache_dir=cache, progress=False)
        except HimoError as error:
            assert str(error).isprintable()
        else:
            built += 1
            assert len(index) == len(list(index)) > 0
            assert index.report.total >= len(index)
    assert built > 10
    assert len(list(cache.iterdir())) == built  # no temporary file stays


HEADER_TOKENS = [b"\0" * 512, b"\xff" * 12, b"\x80" + b"\xff" * 11, b"7777777", b"x", b"L", b"S"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_shards_are_errors_or_counted(
    form: int, tmp_path: Path, generator: Generator
) -> None:
    rng, path = _random(generator), tmp_path / "a.tar"
    files = [(f"{'long' * 40}{i}.{s}", b"some data") for i in range(3) for s in ("png", "txt")]
    data = write_tar(path, files, form).read_bytes()
    outcomes = []
    for _ in range(300):
        path.write_bytes(_damage(data, rng, HEADER_TOKENS))
        start = time.process_time()
        try:
            outcomes.append(len(read(WebDataset(path))[0]))
        except HimoError as error:
            outcomes.append(-1)
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
        assert time.process_time() - start < SECONDS
    assert outcomes.count(-1) > 50 and max(outcomes) == 3


def test_a_damaged_index_is_rebuilt_or_refused_when_read(
    tmp_path: Path, generator: Generator
) -> None:
    rng = _random(generator)
    names = write_images(tmp_path, 8)
    rows = [(name, f"caption {name}") for name in names]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    path = Path(open_dataset(source).path)
    whole = path.read_bytes()
    outcomes = []
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
        try:
            index = open_dataset(source)
            outcome = "read" if path.read_bytes() == whole else "other"
            assert [(r.image, r.caption) for r in index] == rows
        except HimoError as error:
            assert "is damaged at sample" in str(error)
            outcome = "refused"
        outcomes.append(outcome)
    assert outcomes.count("other") == 0
    assert outcomes.count("read") > 50 and outcomes.count("refused") > 50


def test_a_csv_of_another_dialect_is_not_read_in_part(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS, ",")
    text = path.read_text().replace('"', "'")
    path.write_text(text)
    records, bad = read(Table(path))
    assert records == [] and len(bad) == len(ROWS)
    assert all(item.reason == "fields" for item in bad)


def test_an_index_is_not_made_of_a_file_that_is_no_index(tmp_path: Path) -> None:
    path = tmp_path / "a.himo-index"
    for data in (b"", b"x" * 10, b"HIMOIDX1" + b"\0" * 100, bytes(1 << 16)):
        path.write_bytes(data)
        with pytest.raises(HimoError, match=r"a.himo-index: .*; remove it to have the index"):
            SampleIndex(path)
