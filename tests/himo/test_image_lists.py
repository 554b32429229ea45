"""COCO's, Karpathy's and Flickr30k's files of captions, and the splits that a file names."""

import json
from pathlib import Path
from typing import Any

import pytest
from captioned_files import write_coco, write_flickr, write_images, write_jsonl, write_karpathy

from himo.data import open_dataset
from himo.errors import HimoError
from himo.evaluate import open_for_evaluation

ROWS = [(f"images/{n // 2:03}.png", f"Caption {n}.") for n in range(6)]
FIELDS = {"image": "images/000.png", "caption": "One."}


def _pairs(path: Path, **options: Any) -> list[tuple[str, str]]:
    index = open_dataset(path, progress=False, **options)
    return [(record.image, record.caption) for record in index]


@pytest.mark.parametrize(
    ("name", "write", "kind"),
    [
        ("captions_val2017.json", write_coco, "image-list"),
        ("dataset_flickr30k.json", write_karpathy, "image-list"),
        ("results_20130124.token", write_flickr, "flickr"),
        ("test_1k.txt", write_flickr, "flickr"),
    ],
)
def test_several_captions_of_an_image_are_read_in_order(
    name: str, write: Any, kind: str, tmp_path: Path
) -> None:
    write_images(tmp_path, 3)
    path = write(tmp_path / name, ROWS)
    assert _pairs(path) == ROWS
    assert open_dataset(path).report.kind == kind


def test_karpathys_folder_leads_the_path_and_a_split_is_taken(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    write_images(tmp_path / "val2014", 3)
    path = write_karpathy(
        tmp_path / "dataset_coco.json", ROWS, ["test", "restval", "test"], "val2014"
    )
    expected = [(f"val2014/{name}", text) for name, text in ROWS]
    assert _pairs(path) == expected
    assert _pairs(path, split="test") == [*expected[:2], *expected[4:]]
    report = open_dataset(path, split="restval").report
    assert report.splits == {"test": 2, "restval": 1} and report.records == 2
    assert "the file has 2 of test, 1 of restval" in report.summary()


def test_json_lines_have_splits_too(tmp_path: Path) -> None:
    names = write_images(tmp_path, 3)
    path = write_jsonl(tmp_path / "a.jsonl", [(name, "One.") for name in names])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, split in zip(lines, ("train", "test", "test"), strict=True):
        line["split"] = split
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [name for name, _ in _pairs(path, split="test")] == names[1:]
    assert len(_pairs(path)) == 3


def test_evaluating_all_splits_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, 3)
    path = write_karpathy(tmp_path / "dataset_flickr30k.json", ROWS, ["train", "test", "test"])
    index, _ = open_for_evaluation(path, allow_missing=False)
    assert len(index) == 6
    said = "all splits are used, 1 of train, 2 of test; --split takes one"
    assert said in capsys.readouterr().err
    index, _ = open_for_evaluation(path, allow_missing=False, split="test")
    assert len(index) == 4 and capsys.readouterr().err == ""


def test_a_split_that_is_not_there_says_which_are(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    path = write_karpathy(tmp_path / "a.json", ROWS, ["train", "test", "test"])
    with pytest.raises(HimoError, match="expected records of split 'val', there are 1 of train, 2"):
        open_dataset(path, split="val")
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(HimoError, match="of split 'val', there are no records with a split"):
        open_dataset(path, split="val")
    token = write_flickr(tmp_path / "a.token", ROWS)
    with pytest.raises(HimoError, match="split: means nothing for a data set of type flickr"):
        open_dataset(token, split="test")


def test_an_endless_number_of_splits_takes_no_endless_memory(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    lines = [json.dumps(FIELDS | {"split": "s" * 1000 + str(n)}) for n in range(50)]
    lines += [json.dumps(FIELDS | {"split": str(n)}) for n in range(50)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    splits = open_dataset(path, progress=False).report.splits
    assert len(splits) <= 20 and max(map(len, splits)) <= 40


BAD = {
    "no list": ('{"images": {}}', "expected an object with a list of images"),
    "not JSON": ('{"images": [', "not valid JSON"),
    "deep": ('{"images": ' + "[" * 100_000, "not valid JSON|nested too deeply"),
    "annotations": ('{"images": [], "annotations": 5}', "expected a list of annotations"),
    "an annotation": (
        '{"images": [], "annotations": [{"image_id": []}]}',
        "expected annotations with image_id and caption, got",
    ),
    "nothing": ('{"images": []}', "no sample is left"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_list_is_one_clear_error(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(HimoError, match=message):
        open_dataset(path, "image-list", progress=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sentences": []}, "missing_key"),
        ({"sentences": [{"tokens": []}]}, "type"),
        ({"sentences": [7]}, "type"),
        ({"sentences": [{"raw": " "}]}, "empty"),
        ({"filename": None}, "type"),
        ({"filename": "../a.png"}, "path"),
    ],
)
def test_a_bad_image_is_counted_and_the_rest_is_read(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_images(tmp_path, 3)
    path = write_karpathy(tmp_path / "a.json", ROWS)
    value = json.loads(path.read_text())
    value["images"][1] |= change
    path.write_text(json.dumps(value))
    index = open_dataset(path, max_bad_fraction=1, progress=False)
    assert [record.caption for record in index] == [text for _, text in ROWS[:2] + ROWS[4:]]
    assert set(index.report.bad) == {reason}
    assert index.report.bad_examples[0].startswith(f"{path}: ")


def test_an_image_of_coco_without_caption_is_bad(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    path = write_coco(tmp_path / "a.json", ROWS)
    value = json.loads(path.read_text())
    value["annotations"] = value["annotations"][2:]
    value["images"].append(5)
    path.write_text(json.dumps(value))
    report = open_dataset(path, max_bad_fraction=1, progress=False).report
    assert report.records == 4 and report.bad == {"missing_key": 1, "type": 1}
    assert "image 1: image 1000 has no file_name or no caption" in report.bad_examples[0]


@pytest.mark.parametrize("line", ["a.png\tOne.", "a.png#x\tOne.", "a.png#0 One.", "#0\tOne."])
def test_a_bad_line_of_flickr_is_counted_and_said_where(line: str, tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    path = write_flickr(tmp_path / "a.token", ROWS)
    path.write_text(f"{path.read_text()}\n{line}\n")
    report = open_dataset(path, max_bad_fraction=1, progress=False).report
    assert report.records == 6 and report.bad_count == 1
    assert report.bad_examples[0].startswith(f"{path}:8: ")
