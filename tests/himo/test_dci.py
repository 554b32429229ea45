"""DCI's annotations as downloaded: the same pairs as in the csv that is made of them."""

import json
from pathlib import Path

import pytest
from captioned_files import write_csv, write_images
from evaluate_cases import write_checkpoint

from himo.cli import main
from himo.data import open_dataset
from himo.errors import HimoError

# In the order of the files' names; the captions of two images are empty.
CAPTIONS = {
    "sa_10": "Ten. And more.",
    "sa_2": "",
    "sa_3": "Drei:\ta door",
    "sa_4": " \n",
    "sa_5": "5",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """annotations/ and photos/, as DCI's download has them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for place, name in enumerate(write_images(photos, len(CAPTIONS))):
        (photos / name).rename(photos / f"{list(CAPTIONS)[place]}.jpg")
    (tmp_path / "annotations").mkdir()
    for name, caption in CAPTIONS.items():
        value = {"image": f"{name}.jpg", "short_caption": "Short.", "extra_caption": caption}
        write(tmp_path, name, json.dumps(value | {"mask_data": {"0": {"caption": "A part."}}}))
    (tmp_path / "annotations" / "README.txt").write_text("no annotation")
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / "annotations" / f"{name}.json").write_text(text, encoding="utf-8")


def pairs(folder: Path) -> list[tuple[str, str]]:
    index = open_dataset(folder / "annotations", "dci", progress=False, max_bad_fraction=1)
    return [(record.image, record.caption) for record in index]


def test_extra_captions_are_read_by_the_order_of_names_without_empty_ones(folder: Path) -> None:
    expected = [("sa_10.jpg", "Ten. And more."), ("sa_3.jpg", "Drei:\ta door"), ("sa_5.jpg", "5")]
    assert pairs(folder) == expected
    index = open_dataset(folder / "annotations", "dci", progress=False)
    assert index.report.ignored == {"files without an extra_caption": 2}
    assert index.open_image(1).size == index.open_image(0).size
    # The cached index is built again when a file changes.
    write(folder, "sa_2", json.dumps({"image": "sa_2.jpg", "extra_caption": "Two."}))
    assert pairs(folder)[1] == ("sa_2.jpg", "Two.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "syntax"),
        ("[" * 100_000, "syntax"),
        ("[]", "missing_key"),
        ('{"image": "a.jpg"}', "missing_key"),
        ('{"image": "a.jpg", "extra_caption": null}', "type"),
        ('{"image": 3, "extra_caption": "A."}', "type"),
    ],
)
def test_a_bad_file_is_named(text: str, reason: str, folder: Path) -> None:
    write(folder, "sa_3", text)
    index = open_dataset(folder / "annotations", "dci", progress=False, max_bad_fraction=1)
    assert len(index) == 2
    assert index.report.bad == {reason: 1}
    assert "annotations/sa_3.json" in index.report.bad_examples[0]


def test_a_folder_without_annotations_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HimoError, match=r"expected DCI's annotations, NAME\.json for each image"):
        open_dataset(tmp_path, "dci")
    with pytest.raises(HimoError, match="none: cannot be listed"):
        open_dataset(tmp_path / "none", "dci")


def test_himo_eval_scores_them_as_the_csv(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    results = []
    for _ in range(2):
        out = tmp_path / "eval.json"
        given = ["eval", "--data", f"long-dci:{folder}", "--pretrained", str(checkpoint)]
        assert main([*given, "--device", "cpu", "--out", str(out)]) == 0
        results.append(json.loads(out.read_text()))
        rows = [(f"{name}.jpg", text) for name, text in CAPTIONS.items() if text.strip()]
        write_csv(folder / "dci_long.csv", rows)  # is taken first
    types = [result["protocol"]["dataset_type"] for result in results]
    assert types == ["dci", "csv"]
    assert results[0]["ranks"] == results[1]["ranks"]
    assert results[0]["retrieval"] == results[1]["retrieval"]
