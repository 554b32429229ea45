"""`himo eval` on named sets: each layout against independent formulas, and the text printed."""

import csv
import json
import shutil
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from evaluate_cases import Command, expected_scores, write_checkpoint
from named_sets import SIZE, write_all

from himo.cli import main
from himo.evaluate.datasets import SETS, SUITES
from himo.evaluate.sentences import split_sentences
from himo.evaluate.suite import WAYS

DOCS = Path(__file__).parents[2] / "himo" / "evaluate" / "datasets.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def suite(data, checkpoint, tmp_path_factory):
    """The folder of the results of --suite paper, and Karpathy's COCO, by one checkpoint."""
    out = tmp_path_factory.mktemp("suite")
    given = ["--pretrained", checkpoint, "--data-root", data, "--out", out / "eval.json"]
    more = ["--suite", "paper", "--data", "coco-karpathy", "--device", "cpu"]
    assert main(["eval", *map(str, given), *more]) == 0
    return out


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    return Command(checkpoint, tmp_path, capsys)


@pytest.fixture(scope="module")
def sets(suite):
    return json.loads((suite / "eval.json").read_text())["models"][0]["sets"]


def _urban1k(root):
    texts = sorted((root / "Urban1k/caption").iterdir())
    return [
        (root / "Urban1k/image" / f"{text.stem}.jpg", text.read_text().splitlines()[0])
        for text in texts
    ]


def _docci(root):
    rows = map(json.loads, (root / "docci/docci_descriptions.jsonlines").open())
    kept = [row for row in rows if row["split"] == "test"]
    return [(root / "docci/images" / row["image_file"], row["description"].strip()) for row in kept]


def _long_dci(root):
    with (root / "dci/dci_long.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [(root / "SA1B" / row["filepath"], row["title"]) for row in rows]


def _flickr30k(root):
    """As the released script: from the lines of the test split, though himo reads the json."""
    lines = [line.split("\t") for line in (root / "flickr/test_1k.txt").read_text().splitlines()]
    return [(root / "flickr/flickr30k-images" / name[:-2], text) for name, text in lines]


def _coco(root):
    value = json.loads((root / "coco/annotations/captions_val2017.json").read_text())
    captions = defaultdict(list)
    for annotation in value["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    images = sorted(value["images"], key=lambda image: image["id"])
    folder = root / "coco/val2017"
    return [(folder / x["file_name"], text) for x in images for text in captions[x["id"]][:5]]


def _coco_karpathy(root):
    images = json.loads((root / "coco/dataset_coco.json").read_text())["images"]
    return [
        (root / "coco" / x["filepath"] / x["filename"], sentence["raw"])
        for x in images
        if x["split"] == "test"
        for sentence in x["sentences"]
    ]


READERS = {
    "urban1k": _urban1k,
    "docci": _docci,
    "long-dci": _long_dci,
    "flickr30k": _flickr30k,
    "coco": _coco,
    "coco-karpathy": _coco_karpathy,
}


@pytest.mark.parametrize("name", READERS)
def test_a_set_is_scored_as_the_released_scripts_do(name, data, checkpoint, sets):
    """Recalls by sorting the whole similarity matrix, each image and text encoded alone."""
    pairs = READERS[name](data)
    paths = list(dict.fromkeys(path for path, _ in pairs))
    owner = torch.tensor([paths.index(path) for path, _ in pairs])
    scores = expected_scores(checkpoint, paths, [text for _, text in pairs])
    assert len(paths) == SIZE
    right = owner[None] == torch.arange(SIZE)[:, None]
    for way, of, match in (
        ("image_to_text", scores, right),
        ("text_to_image", scores.t(), right.t()),
    ):
        order = of.argsort(dim=1, descending=True)
        hits = match.gather(1, order)
        for k in (1, 5, 10):
            expected = 100 * hits[:, :k].any(dim=1).double().mean().item()
            assert sets[name]["retrieval"][way][f"R@{k}"] == pytest.approx(expected)
            measure = sets[name]["measures"][f"R@{k} {WAYS[way]}"]
            assert measure["value"] == pytest.approx(expected)
            assert 0 <= measure["low"] <= expected + 1e-9 and expected - 1e-9 <= measure["high"]
    protocol = sets[name]["protocol"]
    each = SETS[name].captions_per_image
    assert (protocol["images"], protocol["captions"]) == (SIZE, SIZE * (each or 1))
    assert (protocol["dataset"], protocol["split"]) == (name, SETS[name].split)
    assert protocol["captions_per_image"] == each
    assert (protocol["context_length"], protocol["image_resolution"]) == (248, 32)


@pytest.mark.parametrize("name", ["urban1k", "docci", "long-dci"])
def test_himo_at_2_and_3_of_a_set(name, data, checkpoint, sets):
    for segments in (2, 3):
        rising = []
        for path, text in READERS[name](data):
            sentences = split_sentences(text)
            count = len(sentences)
            if count >= segments:
                ends = [count * k // segments for k in range(1, segments + 1)]
                texts = [" ".join(sentences[:end]) for end in ends]
                (scores,) = expected_scores(checkpoint, [path], texts).tolist()
                rising.append(all(a < b for a, b in pairwise(scores)))
        measure = sets[name]["measures"][f"HiMo@{segments}"]
        assert measure["value"] == pytest.approx(100 * sum(rising) / len(rising))


def test_himo_docci_as_the_released_script(data, checkpoint, sets):
    correlations = []
    for line in (data / "docci/himo_docci_data.json").open():
        row = json.loads(line)
        scores = expected_scores(
            checkpoint, [data / "docci/images" / row["img_path"]], row["caption"]
        )
        steps = torch.arange(1.0, len(row["caption"]) + 1)[None]
        correlations.append(torch.corrcoef(torch.cat([scores, steps]))[0, 1].item())
    expected = sum(correlations) / len(correlations)
    assert sets["himo-docci"]["measures"]["HiMo@K"]["value"] == pytest.approx(expected, abs=1e-3)


def test_cola_as_its_own_script(data, checkpoint, sets):
    groups = json.loads((data / "cola/data/COLA_multiobjects_matching_benchmark.json").read_text())
    right = []
    for url1, caption1, url2, caption2 in groups:
        paths = [data / "cola/vg_gqa_images" / url.rsplit("/")[-1] for url in (url1, url2)]
        scores = expected_scores(checkpoint, paths, [caption1, caption2])
        right.append(bool(scores[0, 0] > scores[1, 0] and scores[1, 1] > scores[0, 1]))
    assert 0 < sum(right) < len(right)
    expected = 100 * sum(right) / len(right)
    assert sets["cola"]["measures"]["COLA"]["value"] == pytest.approx(expected)
    assert sets["cola"]["cola"]["correct"] == [int(x) for x in right]


def test_the_lines_of_flickr_give_what_karpathys_file_gives(data, sets, evaluate, tmp_path):
    folder = tmp_path / "flickr"
    shutil.copytree(data / "flickr", folder)
    (folder / "dataset_flickr30k.json").unlink()
    status, result, _, _ = evaluate("--data", f"flickr30k:{folder}")
    assert status == 0
    assert result["retrieval"] == sets["flickr30k"]["retrieval"]
    assert result["protocol"]["dataset_type"] == "flickr"
    assert result["curves"]  # one set and one checkpoint: all of eval.json


@pytest.mark.parametrize(
    ("name", "folder", "place"),
    [("himo-docci", "docci", ("himo", "HiMo@K", "value")), ("cola", "cola", ("cola", "accuracy"))],
)
def test_one_set_of_another_kind_gives_the_usual_result(name, folder, place, data, sets, evaluate):
    status, result, out, _ = evaluate("--data", f"{name}:{data / folder}")
    assert status == 0 and "wrote" in out
    value = result
    for key in place:
        value = value[key]
    (measure,) = sets[name]["measures"].values()
    assert value == pytest.approx(measure["value"])
    assert (result["protocol"]["dataset"], result["protocol"]["split"]) == (name, "all")
    assert "interval_rule" not in result["protocol"]  # there is none in this result


def test_the_tables_hold_the_values_of_the_sets(suite, sets):
    result = json.loads((suite / "eval.json").read_text())
    assert [table["table"] for table in result["tables"]] == [1, 2, 3]
    for table in result["tables"]:
        (row,) = [row for row in table["rows"] if row["source"] == "measured"]
        assert row["method"] == "tiny.safetensors"
        for column, cell in zip(table["columns"], row["cells"], strict=True):
            of_sets = [
                sets[name]["measures"][column["measure"]]["value"] for name in column["sets"]
            ]
            assert cell["value"] == pytest.approx(sum(of_sets) / len(of_sets))
            assert cell["low"] <= cell["value"] <= cell["high"]
            assert "difference" not in cell  # the paper has no such backbone
    with (suite / "eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = [x for x in rows if x["table"] == "1" and x["method"] == "HiMo-CLIP"]
    assert [float(x["value"]) for x in ours if x["backbone"] == "ViT-L/14"] == [
        *(93.0, 93.1, 82.4, 84.4, 62.2, 61.9)
    ]
    average = [
        x for x in rows if x["sets"] == "urban1k+docci+long-dci" and x["measure"] == "HiMo@2"
    ]
    assert [x["source"] for x in average] == ["paper"] * 7 + ["measured"]
    assert {x["measure"] for x in rows if x["sets"] == "coco-karpathy"} > {"R@5 I2T", "R@10 T2I"}
    page = (suite / "eval.html").read_text()
    assert "Table 3: " in page and "tiny.safetensors" in page and "<script" not in page
    assert (suite / "eval.tex").read_text().count(r"\begin{tabular}") == 3


def test_all_that_is_missing_is_said_before_anything_is_scored(data, evaluate, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(data, root)
    shutil.rmtree(root / "Urban1k" / "image")
    (root / "docci" / "images" / "test_00003.jpg").unlink()
    (root / "cola" / "vg_gqa_images" / "5.jpg").unlink()
    shutil.rmtree(root / "coco")
    status, result, out, err = evaluate("--suite", "paper", "--data-root", root)
    assert (status, result, out) == (2, None, "")
    lines = err.splitlines()
    assert len(lines) == 6
    assert (
        "himo: note: urban1k: expected image/ and caption/, in Urban1k/ or urban1k/ of" in lines[0]
    )
    assert "comes from https://huggingface.co/datasets/BeichenZhang/Urban1k" in lines[0]
    assert "1 of 8 images are missing: test_00003.jpg" in lines[1]
    assert "expected annotations/captions_val2017.json with images in val2017/" in lines[2]
    assert "test_00003.jpg" in lines[3] and "himo_docci_data.json:4" in lines[3]
    assert "group 5: 5.jpg" in lines[4]
    assert lines[5].startswith("himo: error: 5 of 7 data sets cannot be scored")

    options = ("--suite", "paper", "--data-root", root, "--allow-missing")
    status, result, out, err = evaluate(*options)
    assert status == 0
    scored = result["models"][0]["sets"]
    assert set(scored) == {"docci", "long-dci", "flickr30k", "himo-docci", "cola"}
    assert scored["docci"]["coverage"]["left_out"] == {"missing": 1}
    table = next(table for table in result["tables"] if table["table"] == 1)
    cells = table["rows"][-1]["cells"]
    assert cells[:2] == [None, None] and None not in cells[2:]
    assert "urban1k: expected image/" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "urban2k:x"], "--data: expected a path, or NAME:FOLDER of urban1k, docci"),
        (["--data", "urban1k:"], "--data: expected NAME:FOLDER, got 'urban1k:'"),
        (["--data", "urban1k"], "--data urban1k: expected its folder, urban1k:FOLDER, or --data-r"),
        (["--data", "urban1k:x", "--split", "test"], "split: means nothing for urban1k"),
        (["--data", "urban1k:x", "--dataset-type", "csv"], "dataset_type: means nothing for ur"),
        (["--data", "urban1k:x", "--allow-missing"], "urban1k: expected image/ and caption/, in x"),
        (["--data", "urban1k:x", "--follow-links"], "urban1k: expected image/ and caption/, in x"),
        (["--data", "urban1k:x", "--data", "urban1k:y"], "urban1k: given twice"),
        (["--data", "docci:x"], "in x, which is no folder; Docci comes from https://google"),
        (["--data", "coco:x", "--data-root", "."], "--data-root: means nothing without --suite"),
        (["--data", "coco:x", "--captions-per-image", "4"], "captions_per_image: means nothing"),
        (
            ["--data", "coco", "--data-root", "x"],
            "in coco/ or COCO/ of x, which is no folder",
        ),
        (["--suite", "paper"], "--suite paper: expected the folder of its data sets, --data-root"),
        (["--suite", "paper", "--data-root", "."], "7 of 7 data sets cannot be scored"),
        (["--suite", "paper", "--data-root", ".", "--out", "a.txt"], "name that ends in .json"),
    ],
)
def test_mistakes_are_said(evaluate, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, result, out, err = evaluate(*options)
    assert (status, result, out) == (2, None, "")
    assert message in err.splitlines()[-1]


def test_every_set_of_the_suite_is_in_a_table_and_in_the_docs():
    text = DOCS.read_text()
    for name, of in SETS.items():
        assert f"`{name}`" in text
        assert of.licence in text and all(link in text for link in _links(of.source))
    for names in SUITES.values():
        assert all(SETS[name].tables for name in names)


def _links(source):
    return [word.rstrip(",") for word in source.split() if word.startswith("https://")]


def test_himo_datasets_lists_what_is_there_and_what_is_missing(data, tmp_path, capsys):
    assert main(["datasets"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line[0] != " "] == list(SETS)
    assert "found" not in out and "docci: Docci; split test; 5,000 images, 5,000 captions" in out

    assert main(["datasets", "--data-root", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.count("  found: ") == len(SETS)
    assert f"  found: {data}/dci/dci_long.csv" in out

    assert main(["datasets", f"coco:{tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert f"  missing: not in {tmp_path}\n" in out and out.count("from: ") == 1

    assert main(["datasets", "nothing:x"]) == 2
    assert "expected a path, or NAME:FOLDER of urban1k" in capsys.readouterr().err

    assert main(["datasets", "coco:a", "coco:b"]) == 2
    assert "expected each set once, got coco again: 'coco:b'" in capsys.readouterr().err
