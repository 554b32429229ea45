"""No command replaces a file that it reads: not by --out, nor by a file that goes next to it."""

import json
from pathlib import Path

import evaluate_cases
import pytest

from himo.checkpoint import convert
from himo.cli import main

MODEL = ["--pretrained", "model.safetensors", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as csv and JSON, a model as a file and as a directory, labels, and a run."""
    folder = tmp_path_factory.mktemp("outputs")
    captions = evaluate_cases.write_captions(folder)
    captions.rename(folder / "pairs.csv")
    (folder / "other.csv").write_bytes((folder / "pairs.csv").read_bytes())
    photos = sorted(path.name for path in folder.glob("*.png"))
    records = [{"image": name, "caption": "A photo."} for name in photos]
    (folder / "set.json").write_text(json.dumps(records))
    (folder / "labels.csv").write_text("red\ngreen\n")
    evaluate_cases.write_checkpoint(folder / "model.safetensors")
    convert(folder / "model.safetensors", folder / "hf", "hf")
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text("{}")
    (folder / "run/eval.json").write_text("{}")
    (folder / "link.json").symlink_to("set.json")
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file by its path, but for the index of data, which is written next to the data."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".himo-index"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("command", "replaced"),
    [
        (["encode", "set.json", "--out", "set.npy", *MODEL], "set.json"),
        (["encode", "set.json", "--out", "link.npy", *MODEL], "set.json"),
        (["encode", "pairs.csv", "--out", "model.safetensors", *MODEL], "model.safetensors"),
        (
            ["encode", "pairs.csv", "--out", "hf/model.safetensors", "--pretrained", "hf"],
            "hf/model.safetensors",
        ),
        (["encode", "pairs.csv", "--out", "hf/config.npy", "--pretrained", "hf"], "hf/config.json"),
        (["classify", "pairs.csv", "--labels", "a,b", "--out", "pairs.html", *MODEL], "pairs.csv"),
        (
            ["classify", "0.png", "--labels", "labels.csv", "--out", "labels.html", *MODEL],
            "labels.csv",
        ),
        (["eval", "--data", "set.json", "--out", "set.json", *MODEL], "set.json"),
        (
            ["eval", "--data", "pairs.csv", "--data", "other.csv", "--out", "pairs.json", *MODEL],
            "pairs.csv",
        ),
        (
            ["eval", "--data", "pairs.csv", "--out", "hf/config.json", "--pretrained", "hf"],
            "hf/config.json",
        ),
        (["report", "run", "--out", "run/config.html"], "run/config.json"),
        (["report", "run", "--out", "run/eval.html"], "run/eval.json"),
        (["convert", "model.safetensors", "model.safetensors"], "model.safetensors"),
        (["convert", "hf", "hf/model.safetensors", "--to", "hf"], "hf/model.safetensors"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else None,
)
def test_what_is_read_is_never_replaced(made, monkeypatch, capsys, command, replaced):
    monkeypatch.chdir(made)
    before = contents(made)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("himo: error: ") and error.count("\n") == 1
    assert f"expected another name: would overwrite {replaced}" in error
    assert contents(made) == before


def test_the_same_outputs_may_be_written_again(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    for command in (
        ["report", "run", "--out", "run/report.html"],
        ["encode", "pairs.csv", "--out", str(tmp_path / "features.npy"), *MODEL],
        ["convert", "model.safetensors", str(tmp_path / "copy.safetensors")],
    ):
        assert main(command) == 0
        assert main(command) == 0


def test_the_result_of_an_evaluation_is_json(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert main(["eval", "--data", "pairs.csv", "--out", "0.png", *MODEL]) == 2
    assert "--out 0.png: expected a name that ends in .json" in capsys.readouterr().err
