"""Flags of `himo train` that change nothing in a run: refused, or said in one line."""

import json
import tarfile
from pathlib import Path

import pytest
from captioned_files import write_images
from train_runs import photos, refused, small_model, train_here

from himo.data import open_dataset

DRY = "--dry-run"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, list[str]]:
    """(csv, flags) of 24 pairs and a model of 0.8 million parameters."""
    folder = tmp_path_factory.mktemp("photos")
    return photos(folder), small_model(folder)


def some_short(folder: Path, every: int) -> Path:
    """24 pairs; each `every`-th has a short caption, none if `every` is 0."""
    path = folder / f"every-{every}.jsonl"
    records = [{"image": name, "caption": f"A {name}."} for name in write_images(folder, 24)]
    for record in records[::every] if every else []:
        record["caption_short"] = "A thing."
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def notes(capsys, pairs: Path, logs: Path, *flags: str) -> list[str]:
    capsys.readouterr()
    assert train_here(pairs, logs, *flags, DRY) == 0
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if line.startswith("himo: note: --")]


def test_the_index_counts_its_short_captions(tmp_path):
    index = open_dataset(some_short(tmp_path, 3), progress=False)
    assert index.short_captions() == 8
    assert index[:4].short_captions() == 2 and index[1:3].short_captions() == 0


def test_short_captions_without_any_are_refused(small, tmp_path, capsys):
    pairs = some_short(tmp_path, 0)
    message = refused(capsys, pairs, tmp_path / "logs", *small[1], "--short-captions")
    assert message == (
        "himo: error: --short-captions: expected pairs with a caption_short, got none among the "
        f"24 of {pairs}"
    )


@pytest.mark.parametrize(("every", "lacking"), [(1, 0), (4, 18)])
def test_pairs_without_a_short_caption_are_counted(every, lacking, small, tmp_path, capsys):
    pairs = some_short(tmp_path, every)
    said = notes(capsys, pairs, tmp_path / "logs", *small[1], "--short-captions")
    lacks = "24 pairs have no caption_short, and keep their caption"
    expected = [f"himo: note: --short-captions: {lacking} of {lacks}"] if lacking else []
    assert [line for line in said if "--short-captions" in line] == expected


def test_flags_of_several_processes_say_that_there_is_one(small, tmp_path, capsys):
    flags = ["--exchange", "ring", "--rank-timeout", "20"]
    said = notes(capsys, small[0], tmp_path, *small[1], *flags)
    for name in ("--exchange", "--rank-timeout"):
        assert f"himo: note: {name} changes nothing: the run has one process" in said


def test_flags_of_paths_say_that_shards_have_none(small, tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, name in enumerate(write_images(tmp_path, 24)):
            (tmp_path / "text").write_text(f"Picture {number}.")
            tar.add(tmp_path / name, f"{number}.png")
            tar.add(tmp_path / "text", f"{number}.txt")
    flags = ["--skip-missing-images", "--follow-links"]
    said = notes(capsys, tmp_path / "a.tar", tmp_path / "logs", *small[1], *flags)
    for name in flags:
        assert f"himo: note: {name} changes nothing: the data hold their images" in said
    said = notes(capsys, small[0], tmp_path / "logs", *small[1], *flags)
    assert not [line for line in said if "changes nothing" in line]


def test_a_run_that_cannot_go_on_says_that_it_begins(small, tmp_path, capsys):
    said = notes(capsys, small[0], tmp_path, *small[1], "--resume", "latest")
    assert "himo: note: --resume latest: no training state there yet, the run begins" in said
