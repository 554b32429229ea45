"""himo explain: the scores are the model's, and bad input is one clear line."""

import base64
import itertools
import json
import re
from pathlib import Path

import numpy as np
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
    flags = ["--pretrained", model, "--out", str(out)]
    # Texts may stand on either side of the flags.
    for arguments in ([image, *texts, *flags], [*flags, image, *texts], [image, *flags, *texts]):
        out.unlink(missing_ok=True)
        assert main(["explain", *arguments]) == 0
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


@pytest.fixture(scope="module")
def data(files: Path) -> Path:
    """A data set of five images with captions of 4 to 6 sentences, one of them of 2."""
    records = []
    for seed in range(5):
        url, sentences = report_runs.scene(seed)
        (files / "images").mkdir(exist_ok=True)
        (files / "images" / f"{seed}.jpg").write_bytes(base64.b64decode(url.partition(",")[2]))
        caption = " ".join(sentences[:2] if seed == 4 else sentences)
        records.append({"image": f"images/{seed}.jpg", "caption": caption})
    path = files / "data.json"
    path.write_text(json.dumps(records))
    return path


def scored(files: Path, image: Path, texts: list[str]) -> list[float]:
    """Computed a text at a time, from the public functions alone."""
    model, preprocess = load(files / "a.safetensors")
    with torch.no_grad():
        picture = model.encode_image(preprocess(open_image(image))[None])
        each = [model.encode_text(tokenize([text])) for text in texts]
    return [F.cosine_similarity(picture, text).item() for text in each]


def numbers(printed: str) -> list[list[float]]:
    """The scores of each image in the tables of the terminal, by their first column k."""
    found: list[list[float]] = []
    for line in printed.splitlines():
        if match := re.match(r" +(\d+) +(-?\d\.\d{4})", line):
            if match[1] == "1":
                found.append([])
            found[-1].append(float(match[2]))
    return found


@pytest.mark.parametrize("k", [2, 3, 4])
def test_k_joins_sentences_as_himo_at_k_does(
    k: int, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {2: [2, 4], 3: [1, 2, 4], 4: [1, 2, 3, 4]}[k]  # floor(4 j / k)
    out = tmp_path / "page.html"
    given = ["explain", str(files / "scene.jpg"), CAPTION, "--k", str(k), "--out", str(out)]
    assert main([*given, "--pretrained", str(files / "a.safetensors")]) == 0
    texts = [" ".join(SEGMENTS[:end]) for end in ends]
    expected = scored(files, files / "scene.jpg", texts)
    assert numbers(capsys.readouterr().out) == [pytest.approx(expected, abs=6e-5)]
    page = out.read_text(encoding="utf-8")
    if k < 4:
        rising = all(a < b for a, b in itertools.pairwise(expected))
        assert f"HiMo@{k}: {'in order' if rising else 'not in order'}</text>" in page
    else:
        rho = np.corrcoef(np.arange(k), expected)[0, 1]
        shown = re.search(rf"HiMo@{k} = (.\d?\.?\d+)</text>", page)
        assert shown is not None
        assert float(shown[1].replace("−", "-")) == pytest.approx(rho, abs=2e-3)
    signs = re.findall(r'<text class="sign"[^>]*>(&lt;|≥)</text>', page)
    pairs = itertools.pairwise(expected)
    assert signs == ["&lt;" if before < after else "≥" for before, after in pairs]


def test_images_of_a_data_set(
    data: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    given = ["explain", "--data", str(data), "--k", "3", "--out", str(out)]
    given += ["--pretrained", str(files / "a.safetensors")]
    assert main([*given, "--image", "2.jpg", "--image", "images/0.jpg"]) == 0
    found = numbers(capsys.readouterr().out)
    for seed, scores in zip((2, 0), found, strict=True):
        sentences = report_runs.scene(seed)[1]
        ends = [len(sentences) * part // 3 for part in (1, 2, 3)]
        texts = [" ".join(sentences[:end]) for end in ends]
        expected = scored(files, files / "images" / f"{seed}.jpg", texts)
        assert scores == pytest.approx(expected, abs=6e-5)
    page = out.read_text(encoding="utf-8")
    assert page.count('<article class="growth') == 2 and "2 images" in page
    # Without names, all that have three sentences.
    assert main(given) == 0
    assert len(numbers(capsys.readouterr().out)) == 4


def test_prefixes_of_himo_docci_are_scored_as_given(
    data: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefixes = ["A picture.", "A picture of shapes", "A picture of shapes, red.", "All of it. Yes."]
    folder = tmp_path / "docci"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "0.jpg").write_bytes((files / "images" / "0.jpg").read_bytes())
    line = {"img_path": "0.jpg", "caption": prefixes, "raw_caption": ""}
    (folder / "himo_docci.jsonl").write_text(json.dumps(line) + "\n")
    given = ["explain", "--data", f"himo-docci:{folder}", "--out", str(tmp_path / "page.html")]
    given += ["--pretrained", str(files / "a.safetensors")]
    assert main(given) == 0
    expected = scored(files, files / "images" / "0.jpg", prefixes)
    assert numbers(capsys.readouterr().out) == [pytest.approx(expected, abs=6e-5)]
    assert main([*given, "--k", "2"]) == 0
    halves = [expected[1], expected[3]]
    assert numbers(capsys.readouterr().out) == [pytest.approx(halves, abs=6e-5)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["DATA", "--image", "9.jpg"], "--image: expected an image of "),
        (["DATA", "--image", "4.jpg", "--k", "3"], "4.jpg: expected at least 3 sentences, got 2"),
        (["DATA", "--k", "9"], "expected captions of at least 9 sentences, got none"),
        (["DATA", "--k", "1"], "--k: expected at least 2, got 1"),
        (["DATA", "scene.jpg"], "--data: expected no image and caption beside it"),
        (["--image", "2.jpg"], "--image: expected a data set to take it from, --data"),
        (["scene.jpg"], "expected an image and its caption, or --data"),
        ([], "expected an image and its caption, or --data"),
        (["scene.jpg", CAPTION, "--k", "5"], "caption: expected at least 5 sentences"),
        (["--data", "none.json"], "none.json"),
    ],
)
def test_images_that_cannot_be_chosen(
    arguments: list[str],
    said: str,
    data: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at = {"DATA": ["--data", str(data)], "scene.jpg": [str(files / "scene.jpg")]}
    given = [part for word in arguments for part in at.get(word, [word])]
    model = ["--pretrained", str(files / "a.safetensors"), "--out", str(tmp_path / "page.html")]
    assert main(["explain", *model, *given]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
