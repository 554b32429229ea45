"""himo encode, search and classify: the numbers are the model's, and bad input is one line."""

import csv
import io
import json
import re
import resource
import tarfile
from pathlib import Path

import evaluate_cases
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from himo.apply.features import read_features
from himo.checkpoint import convert, load
from himo.cli import main
from himo.transforms import open_image

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ with 14 images and no captions, captions.csv of them, and model.safetensors."""
    folder = tmp_path_factory.mktemp("apply")
    (folder / "photos").mkdir()
    captions = evaluate_cases.write_captions(folder / "photos")
    captions.rename(folder / "captions.csv")
    evaluate_cases.write_checkpoint(folder / "model.safetensors")
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`made`, and an own working directory for what a test writes."""
    monkeypatch.chdir(tmp_path)
    return made


def himo(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def encode(files: Path, *arguments: object) -> int:
    pretrained = ("--pretrained", files / "model.safetensors", "--device", "cpu")
    return himo("encode", *arguments, *pretrained)


def classify(files: Path, *arguments: object) -> int:
    pretrained = ("--pretrained", files / "model.safetensors", "--device", "cpu")
    return himo("classify", *arguments, *pretrained)


def cosines(files: Path, names: list[str], texts: list[str]) -> torch.Tensor:
    paths = [files / "photos" / name for name in names]
    return evaluate_cases.expected_scores(files / "model.safetensors", paths, texts)


def names(files: Path) -> list[str]:
    return sorted(path.name for path in (files / "photos").glob("*.png"))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_encoded_features_are_the_models(files: Path, suffix: str) -> None:
    out = Path(f"features{suffix}")
    assert encode(files, files / "photos", "--out", out) == 0
    stored = torch.from_numpy(np.load(out)) if suffix == ".npy" else load_file(out)["features"]
    about = json.loads(Path("features.json").read_text())
    assert about["ids"] == names(files)
    assert about["model"]["pretrained"] == str(files / "model.safetensors")
    features, read = read_features(str(out))
    assert torch.equal(features, stored) and read.ids == about["ids"]
    assert stored.dtype == torch.float32
    torch.testing.assert_close(stored.norm(dim=1), torch.ones(14))
    model, preprocess = load(files / "model.safetensors")
    for name, row in zip(about["ids"], stored, strict=True):
        pixels = preprocess(open_image(files / "photos" / name))[None]
        with torch.no_grad():
            (expected,) = model.encode_image(pixels, normalize=True)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_that_the_disk_cannot_hold_are_an_error_with_their_name(
    files: Path, capsys, suffix: str
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (800, limits[1]))  # 14 features take 896 bytes
    try:
        assert encode(files, files / "photos", "--out", f"full{suffix}") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err
    assert f"himo: error: full{suffix}: not written, file too large: needs 896 bytes, " in message
    assert not list(Path().iterdir())


def test_data_sets_and_files_are_encoded_too(files: Path) -> None:
    photos = files / "photos"
    table = ("--image-root", photos, "--csv-img-key", "filepath")
    assert encode(files, files / "captions.csv", *table, "--out", "csv.npy") == 0
    assert encode(files, photos / "3.png", photos / "1.png", "--out", "two.npy") == 0
    with tarfile.open("shard-000.tar", "w") as tar:
        for number in (3, 1):
            tar.add(photos / f"{number}.png", f"{number}.png")
            caption = tarfile.TarInfo(f"{number}.txt")
            caption.size = 5
            tar.addfile(caption, io.BytesIO(b"A dot"))
    assert encode(files, "shard-000.tar", "--out", "tar.npy") == 0
    ids = {name: read_features(f"{name}.npy")[1].ids for name in ("csv", "two", "tar")}
    assert ids["csv"] == [f"{number}.png" for number in range(14)]
    assert ids["two"] == [str(photos / "3.png"), str(photos / "1.png")]
    assert ids["tar"] == ["shard-000.tar/3.png", "shard-000.tar/1.png"]
    everything = np.load("csv.npy")
    for name in ("two", "tar"):
        np.testing.assert_allclose(np.load(f"{name}.npy"), everything[[3, 1]], atol=1e-6)
    assert himo("search", "a dot", "--features", "tar.npy") == 0
    assert Path("search.html").read_text().count("data:image/jpeg") == 2


def test_a_folder_with_captions_is_a_data_set(files: Path, capsys) -> None:
    folder = Path("pairs")
    folder.mkdir()
    (folder / "a.png").write_bytes((files / "photos" / "0.png").read_bytes())
    (folder / "labels.txt").write_text("not the caption of an image")
    assert encode(files, folder, "--out", "loose.npy") == 0
    (folder / "a.txt").write_text("A caption.")
    (folder / "labels.txt").unlink()
    assert encode(files, folder, "--out", "pairs.npy") == 0
    assert np.array_equal(np.load("loose.npy"), np.load("pairs.npy"))
    assert capsys.readouterr().out.splitlines() == [
        "wrote loose.npy: 1 image, 16 features; loose.json",
        "wrote pairs.npy: 1 image, 16 features; pairs.json",
    ]


def test_search_finds_the_nearest_images(files: Path, capsys) -> None:
    texts = ["a red dot", "a <b>blue</b> one"]
    assert encode(files, files / "photos", "--out", "features.npy") == 0
    capsys.readouterr()
    assert himo("search", *texts, "--features", "features.npy", "--top", 3, "--out", "a.html") == 0
    printed = capsys.readouterr().out.splitlines()
    scores = cosines(files, names(files), texts)
    expected = []
    for text, column in zip(texts, scores.t(), strict=True):
        order = column.argsort(descending=True)[:3].tolist()
        expected += [text, *(f"  {column[row]:.4f}  {names(files)[row]}" for row in order)]
    assert printed == [*expected, f"page: {Path('a.html').resolve()}"]
    page = Path("a.html").read_text()
    assert page.count("data:image/jpeg") == 6
    assert "a &lt;b&gt;blue&lt;/b&gt; one" in page and "<b>blue" not in page


def test_search_without_the_images_has_no_thumbnails(files: Path, capsys) -> None:
    Path("some").mkdir()
    for name in ("0.png", "1.png"):
        Path("some", name).write_bytes((files / "photos" / name).read_bytes())
    assert encode(files, "some", "--out", "features.npy") == 0
    Path("some", "0.png").unlink()
    assert himo("search", "a dot", "--features", "features.npy") == 0
    page = Path("search.html").read_text()
    assert page.count("data:image/jpeg") == 1 and page.count("no thumbnail") == 1
    Path("some", "1.png").unlink()
    assert himo("search", "a dot", "--features", "features.npy") == 0
    assert "note: the page has no thumbnails: " in capsys.readouterr().err


def test_a_checkpoint_is_compared_with_the_one_that_encoded(files: Path, capsys) -> None:
    assert encode(files, files / "photos", "--out", "features.npy") == 0
    convert(files / "model.safetensors", "other.pt")
    assert himo("search", "a", "--features", "features.npy", "--pretrained", "other.pt") == 2
    message = "himo: error: other.pt: not the model that encoded features.npy\n"
    assert capsys.readouterr().err == message and not Path("search.html").exists()


def test_classify_is_the_softmax_of_scaled_cosines(files: Path, capsys) -> None:
    Path("labels.txt").write_text("red\n\n green \nblue\n")
    template = ("--template", "one {} dot")
    assert classify(files, files / "photos", "--labels", "labels.txt", *template) == 0
    listed = capsys.readouterr().out
    with open("classify.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "label", *COLOURS] and [row[0] for row in rows] == names(files)
    scores = cosines(files, names(files), [f"one {colour} dot" for colour in COLOURS])
    expected = (scores / 0.07).softmax(dim=1)  # a new model's temperature
    got = torch.tensor([[float(value) for value in row[2:]] for row in rows])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert [row[1] for row in rows] == [COLOURS[best] for best in expected.argmax(1)]
    lines = listed.splitlines()
    assert len(lines) == 15 and lines[0].startswith("0.png ") and lines[-1].startswith("page: ")
    for line, row in zip(lines, expected, strict=False):
        shown = [float(value) for value in re.findall(r"([\d.]+) %", line)]
        assert shown == pytest.approx(sorted((100 * row).tolist(), reverse=True), abs=0.051)
    page = Path("classify.html").read_text()
    assert page.count("data:image/jpeg") == 14 and "14 images, 3 labels" in page
    # The same labels in a list.
    assert classify(files, files / "photos", "--labels", "red,green, blue", *template) == 0
    assert capsys.readouterr().out == listed


def test_many_images_are_all_in_the_csv(files: Path, capsys) -> None:
    pictures = [str(files / "photos" / f"{number % 14}.png") for number in range(205)]
    assert classify(files, *pictures, "--labels", "red,blue") == 0
    assert capsys.readouterr().out.splitlines()[-2] == "and 185 more"
    page = Path("classify.html").read_text()
    assert page.count("data:image/jpeg") == 200 and "5 more are in the csv" in page
    assert len(Path("classify.csv").read_text().splitlines()) == 206


def test_what_cannot_be_read_is_left_out_on_request(files: Path, capsys) -> None:
    Path("bad.png").write_bytes(b"no image")
    given = ("bad.png", files / "photos" / "0.png", "--labels", "red,blue")
    assert classify(files, *given) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("himo: error: image 1: bad.png") and "--allow-missing" in printed
    assert not Path("classify.html").exists()
    assert classify(files, *given, "--allow-missing") == 0
    assert "himo: note: left out: 1 unknown format\n" in capsys.readouterr().err
    assert len(Path("classify.csv").read_text().splitlines()) == 2
    assert classify(files, "bad.png", "--labels", "red,blue", "--allow-missing") == 2
    assert "none of the 1 image can be used: image 1: bad.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "photos", "--out", "a.txt"], "expected a name that ends in .npy or .safetenso"),
        (["encode", "photos", "--out", "no/a.npy"], "--out no/a.npy: cannot be written"),
        (["encode", "empty", "--out", "a.npy"], "empty: expected images in the folder, found none"),
        (["encode", "none", "--out", "a.npy"], "none: no such file or folder"),
        (["encode", "photos", "a.png", "--out", "a.npy"], "photos: expected image files, or one"),
        (["classify", "photos", "--labels", "red"], "at least two labels, got 'red', and there is"),
        (["classify", "photos", "--labels", "one.txt"], "at least two labels, got 'one.txt'"),
        (["classify", "photos", "--labels", "latin.txt"], "latin.txt: expected text in UTF-8"),
        (["classify", "photos", "--labels", "a,b,a"], "--labels: 'a' is given twice"),
        (
            ["classify", "photos", "--labels", "a,b", "--template", "x"],
            "expected a text with {} in",
        ),
        (["classify", "photos", "--labels", "a,b", "--out", "x.pdf"], "a name that ends in .html"),
        (["search", "a", "--features", "none.npy"], "none.npy: cannot be read: no such file"),
        (["search", "a", "--features", "captions.csv"], "a name that ends in .npy or .safetensors"),
        (["search", "a", "--features", "f.npy", "--top", "0"], "--top: expected at least 1, got 0"),
        (["search", "", "--features", "f.npy"], "TEXT: expected at least one token, got ''"),
        (["search", "a", " \t", "--features", "f.npy"], r"one token, got ' \t'"),
        (["search", "&nbsp;", "--features", "f.npy"], "one token, got '&nbsp;'"),
        (["search", "a", "--features", "alone.npy"], "alone.json: cannot be read: no such file"),
        (["search", "a", "--features", "odd.npy"], "odd.json: not what `himo encode` writes"),
        (["search", "a", "--features", "changed.npy"], "changed.npy: damaged, or not the features"),
    ],
)
def test_a_mistake_is_one_line(
    files: Path, capsys, monkeypatch, arguments: list[str], message: str
) -> None:
    Path("photos").symlink_to(files / "photos")
    Path("captions.csv").symlink_to(files / "captions.csv")
    Path("empty").mkdir()
    Path("one.txt").write_text("red\n")
    Path("latin.txt").write_bytes(b"gr\xfcn\nrot\n")
    for name in ("f", "alone", "odd", "changed"):
        assert encode(files, files / "photos" / "0.png", "--out", f"{name}.npy") == 0
    Path("alone.json").unlink()
    Path("odd.json").write_text('{"sha256": "0", "ids": [], "model": {}, "data": {}}')
    np.save("changed.npy", np.zeros((1, 16), np.float32))
    capsys.readouterr()
    before = set(Path().iterdir())
    if arguments[0] != "search":
        arguments = [*arguments, "--pretrained", str(files / "model.safetensors")]
    assert himo(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("himo: error: ") and printed.count("\n") == 1
    assert message in printed
    assert set(Path().iterdir()) == before


def test_a_text_longer_than_the_context_is_a_note(files: Path, capsys) -> None:
    assert encode(files, files / "photos" / "0.png", "--out", "f.npy") == 0
    assert himo("search", "dot " * 300, "--features", "f.npy") == 0
    assert "note: 1 text is longer than 248 tokens and cut" in capsys.readouterr().err


def test_transformers_opens_a_converted_model_and_gives_the_same_probabilities(
    files: Path,
) -> None:
    transformers = pytest.importorskip("transformers", reason="opens what is written")
    convert(files / "model.safetensors", "hf", to="hf")
    ask = transformers.pipeline("zero-shot-image-classification", model="hf", device="cpu")
    image = Path("square.png")  # nothing is cropped, where the two processors differ by a pixel
    Image.open(files / "photos" / "0.png").resize((48, 48)).save(image)
    template = "a photo of a {}."
    answer = ask(str(image), candidate_labels=list(COLOURS), hypothesis_template=template)
    assert classify(files, image, "--labels", ",".join(COLOURS)) == 0
    with open("classify.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    theirs = {found["label"]: found["score"] for found in answer}
    assert {c: float(row[c]) for c in COLOURS} == pytest.approx(theirs, abs=1e-5)
