"""himo explain: the scores are the model's, and bad input is one clear line."""

import base64
import re
from pathlib import Path

import pytest
import report_runs
import torch
from torch.nn import functional as F

from himo.checkpoint import load, save
from himo.cli import main
from himo.model import CONFIGS, HiMoCLIP
from himo.tokenizer import tokenize
from himo.transforms import open_image

CAPTION = "Three shapes & a <b>frame</b>. A red circle on the left! Is there a square? There is."
SEGMENTS = [
    "Three shapes & a <b>frame</b>.",
    "A red circle on the left!",
    "Is there a square?",
    "There is.",
]


SEGMENT = re.compile(r'<span class="segment (\w+)" style="--a:[\d.]+"><b>\d')


def tint(scores: list[list[float]], k: int) -> str:
    """Whether segment k, from 0, raises the similarity in the mean of the models' ranges."""
    return "raises" if sum((s[k] - s[k - 1]) / (max(s) - min(s)) for s in scores) > 0 else "lowers"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scene.jpg and two random models, a.safetensors and b.safetensors."""
    folder = tmp_path_factory.mktemp("explain")
    url, _ = report_runs.scene(1)
    (folder / "scene.jpg").write_bytes(base64.b64decode(url.partition(",")[2]))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save(HiMoCLIP(CONFIGS["tiny"]), folder / f"{name}.safetensors")
    return folder


def cosines(checkpoint: Path, image: Path) -> list[float]:
    """Computed a prefix at a time, from the public functions alone."""
    model, preprocess = load(checkpoint)
    scores = []
    with torch.no_grad():
        picture = model.encode_image(preprocess(open_image(image))[None])
        for k in range(1, len(SEGMENTS) + 1):
            text = model.encode_text(tokenize([" ".join(SEGMENTS[:k])]))
            scores.append(F.cosine_similarity(picture, text).item())
    return scores


def test_scores_on_the_page_and_the_terminal(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = files / "scene.jpg", tmp_path / "page.html"
    models = [files / "a.safetensors", files / "b.safetensors"]
    pretrained = [flag for model in models for flag in ("--pretrained", str(model))]
    assert main(["explain", str(image), CAPTION, *pretrained, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    page = out.read_text(encoding="utf-8")
    rows = re.findall(r"<tr><th scope=\"row\">(\d)</th><td>(.*?)</td><td>(.*?)</td></tr>", page)
    expected = [cosines(model, image) for model in models]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    for k, row in enumerate(rows):
        terminal = printed[k + 1].split()
        assert printed[k + 1].endswith(SEGMENTS[k])
        for model in range(2):
            score = expected[model][k]
            fell = k > 0 and not expected[model][k - 1] < score
            shown = row[model + 1].replace("−", "-")
            assert float(shown.rstrip(" ▼")) == pytest.approx(score, rel=6e-4, abs=1e-5)
            assert shown.endswith("▼") == fell == terminal[model + 1].endswith("*")
            assert float(terminal[model + 1].rstrip("*")) == pytest.approx(score, abs=6e-5)
    assert "a &lt;b&gt;frame&lt;/b&gt;." in page and "<b>frame" not in page
    assert 'src="data:image/jpeg;base64,' in page and "http" not in page.replace("http-equiv", "")
    assert SEGMENT.findall(page) == ["first", *(tint(expected, k) for k in (1, 2, 3))]
    assert page.count('class="show-raw"') == 1


def test_several_texts_are_the_segments(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    texts = ["a scene", "with shapes, one. of them red"]
    model = str(files / "a.safetensors")
    image = str(files / "scene.jpg")
    assert main(["explain", image, *texts, "--pretrained", model, "--out", str(out)]) == 0
    assert len(SEGMENT.findall(out.read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"caption": "One sentence."}, "expected at least two sentences"),
        ({"image": "none.jpg"}, "none.jpg"),
        ({"image": "a.safetensors"}, "a.safetensors"),
        ({"model": "none.safetensors"}, "none.safetensors"),
        ({"model": "scene.jpg"}, "scene.jpg"),
        ({"out": "page.png"}, "expected a name that ends in .html"),
        ({"out": "none/page.html"}, "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    change: dict[str, str],
    said: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"image": "scene.jpg", "model": "a.safetensors", "out": "page.html"} | change
    arguments = ["explain", str(files / given["image"]), given.get("caption", CAPTION)]
    arguments += [
        "--pretrained",
        str(files / given["model"]),
        "--out",
        str(tmp_path / given["out"]),
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_same_checkpoint_twice_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--pretrained", str(files / "a.safetensors")]
    assert main(["explain", str(files / "scene.jpg"), CAPTION, *model, *model]) == 2
    assert "given twice" in capsys.readouterr().err
