"""The sample index: what it holds, when it is built anew, what it reports, how fast it opens."""

import json
import os
import pickle
import time
from pathlib import Path

import pytest
from captioned_files import (
    image_bytes,
    sharegpt4v_record,
    write_images,
    write_jsonl,
    write_sharegpt4v,
    write_tar,
)

from himo.data import SampleIndex, open_dataset
from himo.data.folder import Folder
from himo.data.index import write_index
from himo.data.records import Progress, Record, Source
from himo.errors import HimoError
from himo.transforms import ImageError


def _rows(folder: Path, count: int = 10) -> list[tuple[str, str]]:
    return [(name, f"caption of {name}") for name in write_images(folder, count)]


def _state(index: SampleIndex) -> tuple[int, int]:
    status = os.stat(index.path)
    return status.st_ino, status.st_mtime_ns


def test_it_is_a_sequence_of_records(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    index = open_dataset(write_jsonl(tmp_path / "a.jsonl", rows))

    assert len(index) == 10
    assert index[3] == Record(4, *rows[3]) and index[-1] == Record(10, *rows[-1])
    assert [record.image for record in index] == [image for image, _ in rows]
    with pytest.raises(IndexError):
        index[10]
    held_out, rest = index[:3], index.select(range(3, 10))
    assert [record.line for record in held_out] == [1, 2, 3]
    assert rest.select([1, 0, 1])[2] == index[4]
    assert held_out.report == index.report
    with pytest.raises(HimoError, match="select: expected rows from 0 to 2, got 0 to 3"):
        held_out.select(range(4))
    assert index.describe(3) == f"{tmp_path}/a.jsonl:4: images/003.png"


def test_it_is_kept_and_used_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", _rows(tmp_path))
    first = open_dataset(source)
    assert Path(first.path).parent == tmp_path

    assert _state(open_dataset(source)) == _state(first)
    assert open_dataset(source).report == first.report
    assert open_dataset(source, caption_key="image").path != first.path
    assert open_dataset(os.path.relpath(source)).path == first.path


def test_it_is_built_anew_when_the_source_changes(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    index = open_dataset(source)
    write_jsonl(source, rows[:5])
    assert len(open_dataset(source)) == 5
    assert len(index) == len(list(index)) == 10  # an open index goes on with the old file

    folder = tmp_path / "images"
    for name, caption in rows:
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    assert len(open_dataset(folder)) == 10
    (folder / "000.txt").write_text("another caption")
    assert open_dataset(folder)[0].caption == "another caption"
    (folder / "001.txt").unlink()
    assert len(open_dataset(folder, max_bad_fraction=0.1)) == 9
    with pytest.raises(HimoError, match=r"1 of 10 records are bad .*001.png: has no caption"):
        open_dataset(folder)

    files = [("a.png", image_bytes()), ("a.txt", b"one")]
    shard = write_tar(tmp_path / "a.tar", files)
    assert open_dataset(shard)[0].caption == "one"
    write_tar(shard, [*files[:1], ("a.txt", b"two, longer"), ("b.x", bytes(9999))])
    assert open_dataset(shard)[0].caption == "two, longer"


def test_a_cache_directory_can_be_given_and_is_found_where_the_source_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", _rows(tmp_path))
    given = open_dataset(source, cache_dir=tmp_path / "given" / "deep")
    assert Path(given.path).parent == tmp_path / "given" / "deep"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("himo.data.sources.os.access", lambda path, mode: False)
    assert Path(open_dataset(source).path).parent == tmp_path / "cache" / "himo"

    (tmp_path / "file").write_text("")
    with pytest.raises(HimoError, match=r"cache directory .*: cannot be made: not a directory"):
        open_dataset(source, cache_dir=tmp_path / "file" / "below")


def test_missing_images_are_an_error_that_says_how_many_of_which(tmp_path: Path) -> None:
    rows = [(f"sam/{i}.jpg", "c") for i in range(4)] + [("coco/1.jpg", "c")]
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, *_rows(tmp_path, 3)])
    (tmp_path / "coco").mkdir()

    with pytest.raises(HimoError) as error:
        open_dataset(source)

    assert str(error.value) == (
        f"{source}: 5 of 8 images are missing (sam 4 of 4, coco 1 of 1); first: sam/0.jpg, "
        "sam/1.jpg, sam/2.jpg, sam/3.jpg, coco/1.jpg; skip_missing_images "
        "(--skip-missing-images) leaves them out"
    )
    assert not list(tmp_path.glob("*.himo-index"))

    index = open_dataset(source, skip_missing_images=True)
    assert len(index) == 3
    assert index.report.missing == {"sam": [4, 4], "coco": [1, 1], "images": [0, 3]}
    assert index.report.summary().startswith(
        f"{source}: 3 samples (jsonl); 5 of 8 images are missing (sam 4 of 4, coco 1 of 1)"
    )

    # Images that arrive later are taken up.
    (tmp_path / "coco" / "1.jpg").write_bytes(image_bytes())
    assert len(open_dataset(source, skip_missing_images=True)) == 4


def test_too_many_bad_records_are_one_error(tmp_path: Path) -> None:
    rows: list[tuple[object, object]] = [*_rows(tmp_path, 98), ("../a", "c"), ("images/000.png", 5)]
    source = write_jsonl(tmp_path / "a.jsonl", rows)

    with pytest.raises(HimoError) as error:
        open_dataset(source)
    assert str(error.value) == (
        f"{source}: 2 of 100 records are bad (2 %, the limit is 1 %): 1 path, 1 type; first: "
        f"{source}:99: image path '../a' goes up with .., expected one below the image root; "
        "max_bad_fraction (--max-bad-fraction) sets the limit"
    )
    assert not list(tmp_path.glob("*.himo-index"))

    index = open_dataset(source, max_bad_fraction=0.02)
    assert len(index) == 98
    assert index.report.summary() == f"{source}: 98 samples (jsonl); 2 bad records (1 path, 1 type)"
    with pytest.raises(HimoError, match="2 of 100 records are bad"):
        open_dataset(source, max_bad_fraction=0.01)  # of a cached index too


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_a_source_without_samples_is_an_error(text: str, tmp_path: Path) -> None:
    source = tmp_path / ("a.json" if text == "[]" else "a.jsonl")
    source.write_text(text)
    with pytest.raises(HimoError, match=r"a.json.?: no sample is left"):
        open_dataset(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HimoError, match=r"empty: no sample is left"):
        open_dataset(tmp_path / "empty")


def test_the_digest_tells_one_subset_from_another(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    digests = {
        open_dataset(write_jsonl(tmp_path / f"{number}.jsonl", subset)).report.sha256
        for number, subset in enumerate([rows, rows, rows[:9], rows[::-1]])
    }
    assert len(digests) == 3
    as_list = open_dataset(write_sharegpt4v(tmp_path / "a.json", rows))
    assert as_list.report.sha256 in digests  # whatever the format


def test_a_failure_while_building_leaves_nothing(tmp_path: Path) -> None:
    class Failing(Folder):
        def read(self, progress: Progress):  # type: ignore[no-untyped-def]
            yield Record(0, "a.png", "c")
            raise HimoError("the end")

    with pytest.raises(HimoError, match="the end"):
        _build(tmp_path / "a.himo-index", Failing(tmp_path))
    assert list(tmp_path.iterdir()) == []


def _build(path: Path, source: Source) -> SampleIndex:
    options = {"key": "", "skip_missing_images": False, "max_bad_fraction": 0.0, "progress": False}
    write_index(path, source, None, **options)  # type: ignore[arg-type]
    return SampleIndex(path)


def test_it_is_pickled_as_a_reference_to_its_file(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", _rows(tmp_path))
    index = open_dataset(source).select([4, 2])
    data = pickle.dumps(index)
    assert len(data) < 1000
    assert list(pickle.loads(data)) == list(index)

    write_jsonl(source, _rows(tmp_path)[:5])
    open_dataset(source)
    with pytest.raises(HimoError, match="was indexed anew while it was in use"):
        pickle.loads(data)


def test_images_of_a_shard_are_read_at_their_offset(tmp_path: Path) -> None:
    files = [
        entry
        for number in range(200)
        for entry in (
            (f"{number}.png", image_bytes(number)),
            (f"{number}.cls", b"7"),
            (f"{number}.txt", f"caption {number}".encode()),
        )
    ]
    shards = [write_tar(tmp_path / f"a{i}.tar", files[300 * i : 300 * (i + 1)]) for i in range(2)]
    index = open_dataset(tmp_path / "a{0..1}.tar")

    assert len(index) == 200 and index.report.ignored == {"other files": 200}
    for number in (0, 99, 100, 199):
        assert index.image_source(number) == image_bytes(number)
        assert index[number].caption == f"caption {number}"
        assert index[number].shard == number // 100

    with shards[1].open("r+b") as file:
        file.truncate(index[150].offset + 5)
    assert index.image_source(149) == image_bytes(149)
    with pytest.raises(ImageError, match=r"a1.tar: 150.png is cut off") as error:
        index.open_image(150)
    assert error.value.reason == "truncated"
    with pytest.raises(HimoError, match=r"a1.tar: .* is it complete\?|damaged at byte"):
        open_dataset(tmp_path / "a{0..1}.tar")
    shards[1].unlink()
    with pytest.raises(HimoError, match=r"1 of 2 shards missing: .*a1.tar"):
        open_dataset(tmp_path / "a{0..1}.tar")


def test_many_shards_keep_few_files_open(tmp_path: Path) -> None:
    for number in range(80):
        files = [("a.png", image_bytes(number)), ("a.txt", f"{number}".encode())]
        write_tar(tmp_path / f"{number:03}.tar", files)
    index = open_dataset(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(80), *range(80)]:
        assert index.image_source(number) == image_bytes(number)
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del index
    assert len(os.listdir("/proc/self/fd")) < before


@pytest.mark.slow
def test_a_hundred_thousand_records_open_in_50_ms(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    line = json.dumps(sharegpt4v_record("images/000.png", "A caption of some words. " * 8))
    source = tmp_path / "a.json"
    source.write_text("[" + ",\n".join([line] * 100_000) + "]")
    open_dataset(source, progress=False)

    times = []
    for _ in range(20):
        start = time.perf_counter()
        index = open_dataset(source)
        assert index[77_777].line == 77_778
        times.append(time.perf_counter() - start)

    assert len(index) == 100_000
    assert min(times) < 0.05, times


def test_a_bar_is_shown_when_building_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", _rows(tmp_path, 1) * 5000)
    monkeypatch.setattr("himo.progress.DELAY_S", 600.0)  # a busy machine takes longer than 2 s
    open_dataset(source)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("himo.progress.DELAY_S", 1e-9)
    open_dataset(source, cache_dir=tmp_path / "cache")
    assert "index of a.jsonl: 100%" in capsys.readouterr().err
