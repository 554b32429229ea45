"""The pages of himo search and classify in a real browser: their numbers, and that they fit."""

import csv
from pathlib import Path

import evaluate_cases
import pytest
from browser import NEEDS_BROWSER, SCREENS, Elements, browse, measured

from himo.apply.features import read_features
from himo.cli import main

pytestmark = NEEDS_BROWSER
# Names, a text and a label without a place to break them: they must not widen a phone's page.
LONG_NAME = f"{'holiday_' * 12}1.png"
LONG_TEXT = f"a red dot {'and_on' * 30}"
LABELS = ("red", "green", "blue", "a" * 60)
PROBE = """
const boxes = s => [...document.querySelectorAll(s)].map(e => e.getBoundingClientRect());
const pictures = [...document.querySelectorAll('.gallery img')];
result.pictures = pictures.length;
result.broken = pictures.filter(e => !e.complete || !e.naturalWidth).map(e => e.alt);
result.nameless = pictures.filter(e => !e.alt).length;
result.columns = new Set(boxes('.gallery li').map(box => Math.round(box.left))).size;
const texts = 'h1, h2, p, footer p, .bars th, .bars td';
result.outside = [...document.querySelectorAll(texts)].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > width || e.scrollWidth > e.clientWidth + 1);
}).map(e => e.textContent);
result.smallest = Math.min(...[...document.querySelectorAll(texts)].map(
  e => parseFloat(getComputedStyle(e).fontSize)));
// The share of its cell that each bar fills.
result.bars = [...document.querySelectorAll('.bar span')].map(e => {
  const style = getComputedStyle(e.parentNode);
  const room = e.parentNode.clientWidth - parseFloat(style.paddingRight);
  return e.getBoundingClientRect().width / room;
});
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """search.html of two texts, classify.html, and the files they are made of."""
    folder = tmp_path_factory.mktemp("pages")
    photos = folder / "photos"
    photos.mkdir()
    evaluate_cases.write_captions(photos).unlink()
    (photos / "1.png").rename(photos / LONG_NAME)
    model = ("--pretrained", str(evaluate_cases.write_checkpoint(folder / "model.safetensors")))
    features, device = str(folder / "features.npy"), ("--device", "cpu")
    labels = ("--labels", ",".join(LABELS), "--out", str(folder / "classify.html"))
    found = ("--features", features, "--out", str(folder / "search.html"))
    assert main(["encode", str(photos), *model, "--out", features, *device]) == 0
    assert main(["search", "a blue dot", LONG_TEXT, *found, *device]) == 0
    assert main(["classify", str(photos), *model, *labels, *device]) == 0
    return folder


def test_search_shows_each_text_and_its_images(made: Path, tmp_path: Path) -> None:
    source, console = browse(made / "search.html", tmp_path)
    assert console == []
    names = read_features(str(made / "features.npy"))[1].ids
    photos = [made / "photos" / name for name in names]
    texts = ["a blue dot", LONG_TEXT]
    scores = evaluate_cases.expected_scores(made / "model.safetensors", photos, texts)
    shown = Elements(source).paragraphs
    paths = [text for kind, text in shown if kind == "path"]
    values = [float(text) for kind, text in shown if kind == "value"]
    expected = [column.sort(descending=True) for column in scores.t()]
    assert paths == [names[row] for found in expected for row in found.indices[:10]]
    assert values == pytest.approx(
        [value for found in expected for value in found.values[:10].tolist()], abs=1e-4
    )


def test_classify_shows_the_probabilities_of_the_csv(made: Path, tmp_path: Path) -> None:
    source, console = browse(made / "classify.html", tmp_path)
    assert console == []
    with open(made / "classify.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[2:] == list(LABELS)
    shown = Elements(source)
    assert [text for kind, text in shown.paragraphs if kind == "path"] == [row[0] for row in rows]
    expected = [
        pair
        for row in rows
        for pair in sorted(zip(LABELS, map(float, row[2:]), strict=True), key=lambda of: -of[1])
    ]
    assert [row[0] for row in shown.rows] == [label for label, _ in expected]
    percent = [float(row[2].rstrip(" %")) for row in shown.rows]
    assert percent == pytest.approx([100 * value for _, value in expected], abs=0.051)


@SCREENS
def test_layout_of_search(made: Path, width: int, dark: bool, tmp_path: Path) -> None:
    result = measured(made / "search.html", PROBE, width, dark, tmp_path)
    assert result["pictures"] == 20 and result["broken"] == [] and result["nameless"] == 0
    assert result["columns"] == (2 if width < 500 else 4)
    assert result["outside"] == [] and result["smallest"] >= 12


@SCREENS
def test_layout_of_classify(made: Path, width: int, dark: bool, tmp_path: Path) -> None:
    result = measured(made / "classify.html", PROBE, width, dark, tmp_path)
    assert result["pictures"] == 14 and result["broken"] == [] and result["nameless"] == 0
    assert result["columns"] == (1 if width < 500 else 3)
    assert result["outside"] == [] and result["smallest"] >= 12
    with open(made / "classify.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    shares = [share for row in rows for share in sorted(map(float, row[2:]), reverse=True)]
    assert result["bars"] == pytest.approx(shares, abs=0.03)  # a bar is at least a pixel wide
