"""`himo pack`: shards that webdataset reads, whole or not at all, with what the records said."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from captioned_files import write_csv
from PIL import Image
from train_runs import lines, refused, small_model, train_here

from himo.cli import main
from himo.data import SampleIndex, open_dataset
from himo.transforms import Preprocess

ROOT = Path(__file__).parents[2]
SIDES = [(80, 48), (48, 100), (40, 40), (24, 20), (300, 40)]


def photo(number: int) -> Image.Image:
    """Waves, which survive resizing, of several shapes."""
    width, height = SIDES[number % len(SIDES)]
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (9 + k) + number) * np.cos(y / (7 + k)) for k in range(3)]
    pixels = (127 + 100 * np.stack(waves, -1)).astype(np.uint8)
    return Image.fromarray(pixels)


def source(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(count):
            photo(number).save(folder / f"{number}.png")
            record = {"image": f"{number}.png", "caption": f"Wave {number}. It is \u00e4 wave."}
            if number % 3 == 0:
                record["caption_short"] = f"Wave {number}."
            file.write(json.dumps(record) + "\n")
    return folder / "pairs.jsonl"


def pack(data: Path, out: Path, *more: str, status: int = 0) -> None:
    given = ["pack", str(data), "--out", str(out), "--size", "32", "--shard-pairs", "5"]
    assert main([*given, "--workers", "0", *more]) == status


def captions(index: SampleIndex) -> list[tuple[str, str]]:
    return [(record.caption, record.caption_short) for record in index]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(folder: Path) -> dict[str, bytes]:
    """Names and contents in the shards, by the standard library."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()
    return found


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("form", ["folder", "pattern"])
def test_the_packed_set_has_the_records_of_its_source(tmp_path, capsys, workers, form):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed", "--workers", workers)
    output = capsys.readouterr().out
    assert f"{tmp_path}/packed: 12 pairs in 3 shards, " in output
    path = tmp_path / "packed" / ("{000000..000002}.tar" if form == "pattern" else "")
    packed, before = open_dataset(path), open_dataset(data)
    assert packed.report.kind == "webdataset" and not packed.report.bad_count
    assert captions(packed) == captions(before)


def test_members_carry_image_line_and_captions(tmp_path):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed")
    found = members(tmp_path / "packed")
    names = [f"{row:09}.{suffix}" for row in range(12) for suffix in ("jpg", "json", "txt")]
    assert list(found) == names
    for row, line in enumerate(data.read_text().splitlines()):
        record = json.loads(line)
        about = json.loads(found[f"{row:09}.json"])
        assert about == {**record, "line": row + 1}
        assert found[f"{row:09}.txt"].decode() == record["caption"]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(("form", "suffix"), [("jpeg", "jpg"), ("webp", "webp")])
def test_images_are_the_source_ones_shrunk_and_never_enlarged(tmp_path, mode, form, suffix):
    data = source(tmp_path / "source")
    flags = ["--format", form, "--quality", "95", "--image-mode", mode]
    pack(data, tmp_path / "packed", *flags)
    found = members(tmp_path / "packed")
    for number in range(12):
        image = Image.open(io.BytesIO(found[f"{number:09}.{suffix}"]))
        before = photo(number)
        short = min(before.size)
        size = before.size if short <= 32 else tuple(32 * side // short for side in before.size)
        assert image.format == form.upper() and image.size == size and image.mode == "RGB"
        expected = np.asarray(before.resize(size, Image.Resampling.BICUBIC), dtype=float)
        error = np.asarray(image, dtype=float) - expected
        assert np.sqrt((error**2).mean()) < 6


def test_a_photo_is_near_what_training_would_see_of_it(tmp_path):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed", "--quality", "95")
    preprocess = Preprocess(28)
    before, packed = open_dataset(data), open_dataset(tmp_path / "packed")
    for row in range(12):
        pair = (preprocess.read(index.image_source(row)).float() for index in (before, packed))
        one, other = pair
        assert (one - other).square().mean().sqrt() < 8, row


def test_grey_stays_grey_and_other_modes_become_rgb(tmp_path):
    rows = []
    for mode in ("L", "1", "P", "RGBA", "LA", "I;16", "CMYK"):
        image = photo(0).convert("L") if mode == "I;16" else photo(0)
        name = f"{mode.replace(';', '')}.tif"
        image.convert(mode).save(tmp_path / name)
        rows.append((name, f"In mode {mode}."))
    pack(write_csv(tmp_path / "a.csv", rows), tmp_path / "packed")
    images = [data for name, data in members(tmp_path / "packed").items() if name[-3:] == "jpg"]
    modes = [Image.open(io.BytesIO(data)).mode for data in images]
    assert modes == ["L", "RGB", "RGB", "RGB", "RGB", "L", "RGB"]


@pytest.mark.parametrize("form", ["jpeg", "webp"])
@pytest.mark.parametrize("side", [20, 64])
def test_no_metadata_is_carried_over(tmp_path, form, side):
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    about = {"comment": b"secret comment", "icc_profile": b"secret profile" * 99, "exif": exif}
    photo(0).resize((side, side)).save(tmp_path / "a.jpg", **about)
    assert (tmp_path / "a.jpg").read_bytes().count(b"secret") > 99
    pack(write_csv(tmp_path / "a.csv", [("a.jpg", "A card.")]), tmp_path / "out", "--format", form)
    assert b"secret" not in (tmp_path / "out/000000.tar").read_bytes()


def test_the_same_pack_has_the_same_bytes_for_any_workers(tmp_path):
    data = source(tmp_path / "source", 40)
    for name, workers in (("a", "0"), ("b", "2")):
        pack(data, tmp_path / name, "--workers", workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the library webdataset")
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed")
    shards = f"{tmp_path}/packed/{{000000..000002}}.tar"
    samples = list(
        webdataset.WebDataset(shards, shardshuffle=False)
        .decode("pil")
        .to_tuple("__key__", "jpg", "txt", "json")
    )
    before = open_dataset(data)
    assert [key for key, *_ in samples] == [f"{row:09}" for row in range(12)]
    assert [text for _, _, text, _ in samples] == [record.caption for record in before]
    assert [about["image"] for *_, about in samples] == [record.image for record in before]
    assert all(min(image.size) <= 32 and image.mode == "RGB" for _, image, _, _ in samples)


BROKEN = {2: "unknown_format", 3: "truncated", 9: "missing"}


def broken(folder: Path) -> Path:
    data = source(folder)
    open_dataset(data)  # so that the missing one is indexed
    (folder / "2.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes(b"")
    (folder / "9.png").unlink()
    return data


def test_images_that_cannot_be_read_are_left_out_counted_and_said(tmp_path, capsys):
    data = broken(tmp_path / "source")
    pack(data, tmp_path / "packed", "--max-bad-fraction", "0.25")
    said = capsys.readouterr()
    assert "9 pairs in 3 shards" in said.out
    assert "left out: 3 of 12 images could not be read (1 missing, 1 truncated, 1 unknown_" in (
        said.err
    )
    assert "pairs.jsonl:3: 2.png: " in said.err
    kept = [row for row in range(12) if row not in BROKEN]
    packed = open_dataset(tmp_path / "packed")
    assert [record.image for record in packed] == [f"{row:09}.jpg" for row in kept]
    pack(data, tmp_path / "packed", "--max-bad-fraction", "0.25")  # what was counted stays so
    again = capsys.readouterr()
    assert "3 of 12 images could not be read" in again.err and "3 of them there" in again.out


def test_too_many_bad_images_end_it_and_keep_what_is_finished(tmp_path, capsys):
    data = broken(tmp_path / "source")
    pack(data, tmp_path / "packed", "--max-bad-fraction", "0.2", status=2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("himo: error: ")
    assert "3 of 12 images could not be read (1 missing, 1 truncated, 1 unknown_format)" in message
    assert "the limit is 20 % (--max-bad-fraction); the finished shards are kept" in message
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == [
        *("000000.tar", "pack.json")
    ]
    pack(data, tmp_path / "packed", "--max-bad-fraction", "0.25")
    assert "9 pairs in 3 shards, 1 of them there before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_pack_goes_on_with_the_missing_shards(tmp_path):
    data = source(tmp_path / "source")
    data.write_text(data.read_text() * 100)  # the kill must come before the end, on any machine
    pack(data, tmp_path / "whole")
    out = tmp_path / "packed"
    command = [sys.executable, "-m", "himo", "pack", str(data), "--out", str(out)]
    command += ["--size", "32", "--shard-pairs", "5", "--workers", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.monotonic() + 240
    while len(list(out.glob("*.tar"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    for name, content in contents(out).items():  # nothing half-written under a final name
        if name.endswith(".tar"):
            assert content == (tmp_path / "whole" / name).read_bytes()
    finished = list(json.loads((out / "pack.json").read_text())["shards"])
    assert 0 < len(finished) < 240
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    pack(data, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert times == {name: (out / name).stat().st_mtime_ns for name in finished}


def test_a_stopped_pack_says_so_and_leaves_no_worker(tmp_path):
    data = source(tmp_path / "source")
    data.write_text(data.read_text() * 5000)  # the stop must come before the end, on any machine
    command = [sys.executable, "-m", "himo", "pack", str(data), "--out", str(tmp_path / "packed")]
    process = subprocess.Popen(
        [*command, "--shard-pairs", "5", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("packed/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=240)  # also waits for workers, which hold the pipe
    assert process.returncode == 130 and said.strip().endswith("himo: interrupted")
    assert not list(tmp_path.glob("packed/.himo-*"))


def test_a_shard_that_was_cut_or_removed_is_written_again(tmp_path):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed")
    whole = contents(tmp_path / "packed")
    os.truncate(tmp_path / "packed/000001.tar", 512)
    (tmp_path / "packed/000002.tar").unlink()
    pack(data, tmp_path / "packed")
    assert contents(tmp_path / "packed") == whole


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--size", "48"], "size"),
        (["--quality", "80", "--shard-pairs", "6"], "quality, shard_pairs"),
        (["--format", "webp", "--image-mode", "fast"], "format, mode"),
    ],
)
def test_another_pack_in_the_folder_is_refused(tmp_path, capsys, flags, names):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "packed")
    whole = contents(tmp_path / "packed")
    pack(data, tmp_path / "packed", *flags, status=2)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"holds a pack of other data or options ({names}): give another folder" in message
    assert contents(tmp_path / "packed") == whole


def test_a_pack_of_other_records_is_refused(tmp_path, capsys):
    pack(source(tmp_path / "one"), tmp_path / "packed")
    pack(source(tmp_path / "two", 13), tmp_path / "packed", status=2)
    assert "other data or options (sha256)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "pack.json: is damaged; remove the folder to pack anew"),
        (b"[]", "pack.json: is damaged"),
        (b'{"key": {}, "shards": {"000000.tar": {"pairs": "1"}}}', "pack.json: is damaged"),
        (b'{"key": [], "shards": {}}', "other data or options (version, sha256, size, format, "),
    ],
)
def test_a_damaged_manifest_is_one_line(tmp_path, capsys, content, said):
    data = source(tmp_path / "source")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/pack.json").write_bytes(content)
    pack(data, tmp_path / "packed", status=2)
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--size", "15"], "--size: expected 16 to 4096, got 15"),
        (["--size", "5000"], "--size: expected 16 to 4096, got 5000"),
        (["--quality", "0"], "--quality: expected 1 to 100, got 0"),
        (["--shard-pairs", "0"], "--shard-pairs: expected 1 to 1000000, got 0"),
        (["--workers", "-1"], "--workers: expected 0 to 1024, got -1"),
        (["--image-root", "nowhere"], "image root 'nowhere': expected an existing directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_are_one_line_and_make_no_folder(tmp_path, capsys, flags, said):
    pack(source(tmp_path / "source"), tmp_path / "packed", *flags, status=2)
    message = capsys.readouterr().err
    assert message.startswith("himo: error: ") and said in message and message.count("\n") == 1
    assert not (tmp_path / "packed").exists()


def test_a_folder_of_other_files_is_refused(tmp_path, capsys):
    data = source(tmp_path / "source")
    pack(data, tmp_path / "source", status=2)
    message = capsys.readouterr().err
    assert "source: expected an empty folder, or one of an earlier pack" in message
    (tmp_path / "file").write_text("x")
    pack(data, tmp_path / "file", status=2)
    assert "file: cannot be made: file exists" in capsys.readouterr().err


def test_a_format_that_does_not_exist_is_refused(tmp_path, capsys):
    pack(source(tmp_path / "source"), tmp_path / "packed", "--format", "gif", status=2)
    assert "invalid choice: 'gif'" in capsys.readouterr().err


def test_a_run_trains_on_the_shards_and_takes_short_captions(tmp_path):
    data = source(tmp_path / "source", 24)
    pack(data, tmp_path / "packed")
    flags = [*small_model(tmp_path), "--epochs", "1"]
    pattern = tmp_path / "packed" / "{000000..000004}.tar"
    found = []
    for name, path, more in (
        ("folder", tmp_path / "packed", []),
        ("pattern", pattern, []),
        ("short", pattern, ["--short-captions"]),
    ):
        assert train_here(path, tmp_path / name, *flags, *more) == 0
        found.append([line["loss"] for line in lines(tmp_path / name)])
    assert len(found[0]) == 3 and found[0] == found[1]
    assert found[0] != found[2]


def test_a_run_validates_on_the_pairs_that_it_would_hold_out_of_the_source(tmp_path, capsys):
    data = source(tmp_path / "source", 24)
    pack(data, tmp_path / "packed")
    pack(source(tmp_path / "other", 6), tmp_path / "packed-other")
    flags = [*small_model(tmp_path), "--epochs", "1", "--warmup", "0"]
    found = []
    for name, path, more in (
        ("source", data, ["--held-out", "8"]),
        ("packed", tmp_path / "packed", ["--held-out", "8"]),
        ("validated", tmp_path / "packed", ["--val-data", str(tmp_path / "packed-other")]),
    ):
        assert train_here(path, tmp_path / name, *flags, *more) == 0
        last = lines(tmp_path / name)[-1]
        pairs = [row["caption"] for row in last["predictions"]]
        found.append((last["step"], pairs, 0 <= last["val_text_to_image_R@1"] <= 100))
    captions = [json.loads(line)["caption"] for line in data.read_text().splitlines()[:4]]
    assert found == [(2, captions, True), (2, captions, True), (3, captions, True)]
    model = tmp_path / "packed/run/checkpoints/best.safetensors"
    given = ["eval", "--data", tmp_path / "packed-other", "--pretrained", model]
    assert main([*map(str, given), "--out", f"{tmp_path}/eval.json"]) == 0
    assert "used 6 of 6 records" in capsys.readouterr().out


def test_a_missing_shard_of_the_pattern_is_named(tmp_path, capsys):
    pack(source(tmp_path / "source"), tmp_path / "packed")
    capsys.readouterr()
    message = refused(capsys, tmp_path / "packed" / "{000000..000004}.tar", tmp_path)
    assert "2 of 5 shards missing" in message and "000003.tar" in message
