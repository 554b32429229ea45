"""`himo eval` from files to eval.json: every number against features made one at a time."""

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from evaluate_cases import (
    COLOURS,
    CONFIG,
    IMAGES,
    Command,
    expected_scores,
    write_captions,
    write_checkpoint,
    write_prefixes,
)
from PIL import Image

from himo.data import open_dataset
from himo.evaluate import SENTENCE_RULE_SHA256, open_for_evaluation
from himo.evaluate.encode import distinct_tokens
from himo.evaluate.metrics import segment_boundaries
from himo.evaluate.retrieval import group_by_image
from himo.evaluate.sentences import split_sentences
from himo.files import sha256_file
from himo.tokenizer import tokenize


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path)


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    return Command(checkpoint, tmp_path, capsys)


@pytest.fixture
def prefixes(captions):
    return write_prefixes(captions)


def test_a_captioned_set_from_files_to_result(evaluate, captions, checkpoint):
    status, result, out, err = evaluate("--data", captions, "--batch-size", 4)
    assert (status, err) == (0, "")

    index = open_dataset(captions)
    texts = [record.caption for record in index]
    paths = [index.image_source(row) for row in range(len(index))]
    scores = expected_scores(checkpoint, paths, texts)
    ranks = [(row >= own).sum().item() for row, own in zip(scores, scores.diag(), strict=True)]
    back = [(row >= own).sum().item() for row, own in zip(scores.t(), scores.diag(), strict=True)]
    assert result["ranks"] == {"image_to_text": ranks, "text_to_image": back}
    for way, own in (("image_to_text", ranks), ("text_to_image", back)):
        share = {f"R@{k}": 100 * sum(rank <= k for rank in own) / IMAGES for k in (1, 5, 10)}
        assert result["retrieval"][way] == share
    assert result["retrieval"]["chance_R@1"] == 100 / IMAGES

    sentences = [split_sentences(text) for text in texts]
    for segments in (2, 3):
        rising = []
        for path, own in zip(paths, sentences, strict=True):
            if len(own) >= segments:
                parts = [" ".join(own[:end]) for end in segment_boundaries(len(own), segments)]
                series = expected_scores(checkpoint, [path], parts)[0]
                rising.append(bool((series.diff() > 0).all()))
        assert result["himo"][f"HiMo@{segments}"] == {
            "value": 100 * sum(rising) / len(rising),
            "used": len(rising),
            "left_out": IMAGES - len(rising),
        }
    assert result["himo"]["HiMo@K"]["used"] == sum(len(own) > 3 for own in sentences) == 8
    assert result["histogram"]["K"] == [len(own) for own in sentences if len(own) > 3]

    protocol = result["protocol"]
    assert (protocol["images"], protocol["captions"]) == (IMAGES, IMAGES)
    assert protocol["positives"] == "1 caption per image"
    assert (protocol["ties"], protocol["precision"]) == ("pessimistic", "float32")
    assert protocol["sentence_rule_sha256"] == SENTENCE_RULE_SHA256
    assert protocol["dataset"] == str(captions)
    assert protocol["dataset_sha256"] == index.report.sha256
    assert result["model"]["sha256"] == sha256_file(checkpoint)
    assert result["model"]["config"] == CONFIG.to_dict()
    assert result["coverage"] == {
        "used": IMAGES,
        "total": IMAGES,
        "left_out": {},
        "examples": [],
    }
    assert "image to text" in out
    assert f"used {IMAGES} of {IMAGES} records" in out
    folder = str(checkpoint.parent.parent)  # of all files here, and as long as pytest makes it
    assert all(len(line) <= 80 for line in out.splitlines() if folder not in line)


def test_misses_are_captions_with_the_images_that_fit_them_best(evaluate, captions, checkpoint):
    result = evaluate("--data", captions).result
    index = open_dataset(captions)
    names = [record.image for record in index]
    text_of = {" ".join(record.caption.split()): row for row, record in enumerate(index)}
    ranks = result["ranks"]["text_to_image"]
    missed = sum(rank > 1 for rank in ranks)
    assert len(result["misses"]) == min(6, missed) > 0
    drawn = "drawn at random with a fixed seed."
    assert result["chosen"]["misses"] == (
        f"{min(6, missed)} of {missed} captions that were missed, {drawn}"
    )
    eligible = sum(len(split_sentences(text)) > 3 for text in text_of)
    assert result["chosen"]["curves"] == f"6 of {eligible} captions of at least 4 parts, {drawn}"
    for miss in result["misses"]:
        row = text_of[miss["caption"]]
        assert miss["rank"] == ranks[row] > 1
        scores = expected_scores(
            checkpoint, [captions.parent / name for name in names], [miss["caption"]]
        )[:, 0]
        best = scores.topk(min(5, len(names)))
        assert [
            scores[names.index(image["name"])].item() for image in miss["top"]
        ] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert miss["image"]["name"] == names[row] != miss["top"][0]["name"]
        for place, picture in enumerate(miss["top"], 1):
            assert picture["thumbnail"].startswith("data:image/jpeg;base64,")
            assert picture["right"] == (place == miss["rank"]) == (picture["name"] == names[row])
        assert miss["image"]["thumbnail"].startswith("data:image/jpeg;base64,")


def test_curves_hold_sentences_scores_and_a_thumbnail(evaluate, captions, checkpoint):
    _, result, _, _ = evaluate("--data", captions)
    assert len(result["curves"]) == 6
    by_image = {record.image: record.caption for record in open_dataset(captions)}
    for curve in result["curves"]:
        sentences = split_sentences(by_image[curve["image"]])
        assert curve["segments"] == sentences
        assert len(sentences) > 3
        parts = [" ".join(sentences[:end]) for end in range(1, len(sentences) + 1)]
        path = captions.parent / curve["image"]
        expected = expected_scores(checkpoint, [path], parts)[0]
        assert torch.allclose(torch.tensor(curve["scores"]), expected, atol=1e-5)
        head, data = curve["thumbnail"].split(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 160
    _, again, _, _ = evaluate("--data", captions)
    assert again["curves"] == result["curves"]


def test_batch_size_and_threads_change_no_result(evaluate, captions):
    results = [
        evaluate("--data", captions, "--batch-size", batch_size, "--workers", workers)[1]
        for batch_size, workers in ((1, 1), (5, 3), (64, 2))
    ]
    assert results[0]["ranks"] == results[1]["ranks"] == results[2]["ranks"]


def test_captions_of_an_image_are_all_positives(evaluate, captions, checkpoint):
    lines = captions.read_text().splitlines()
    more = [f"{number}.png\tAn {COLOURS[number]} extra caption." for number in (3, 3, 5)]
    captions.write_text("\n".join(lines + more) + "\n")
    _, result, _, _ = evaluate("--data", captions)
    assert result["protocol"]["positives"] == "1 to 3 captions per image"
    assert (result["protocol"]["images"], result["protocol"]["captions"]) == (IMAGES, IMAGES + 3)

    index = open_dataset(captions)
    owner_of = {record.caption: int(record.image.removesuffix(".png")) for record in index}
    assert len(owner_of) == IMAGES + 2  # image 3 has one text twice, which is there once
    owners = list(owner_of.values())
    paths = [captions.parent / f"{number}.png" for number in range(IMAGES)]
    scores = expected_scores(checkpoint, paths, list(owner_of))
    for image, rank in enumerate(result["ranks"]["image_to_text"]):
        own = torch.tensor([owner == image for owner in owners])
        best = scores[image][own].max()
        assert rank == 1 + (scores[image][~own] >= best).sum().item()
    for text, rank in enumerate(result["ranks"]["text_to_image"]):
        assert rank == (scores[:, text] >= scores[owners[text], text]).sum().item()


def label_captions(captions: Path, labels: Sequence[str]) -> None:
    """The captions of the images 0, 1, ... are these."""
    rows = [f"{number}.png\t{label}" for number, label in enumerate(labels)]
    captions.write_text("\n".join(["filepath\ttitle", *rows]) + "\n")


def test_every_image_of_a_shared_caption_is_right(evaluate, captions, checkpoint):
    # Cat is written in three ways that the model cannot tell apart, and dog in two.
    labels = ["A cat.", "A dog.", "a  CAT.", "An owl.", "A dog .", "a&#32;cat."]
    label_captions(captions, labels)
    _, result, out, _ = evaluate("--data", captions)
    paths = [captions.parent / f"{number}.png" for number in range(6)]
    scores = expected_scores(checkpoint, paths, ["A cat.", "A dog.", "An owl."])
    own = [0, 1, 0, 2, 1, 0]  # the text of each image
    expected = [int((row >= row[text]).sum()) for row, text in zip(scores, own, strict=True)]
    assert result["ranks"]["image_to_text"] == expected
    expected = []
    for text, column in enumerate(scores.t()):
        right = torch.tensor([text == other for other in own])
        expected.append(1 + int((column[~right] >= column[right].max()).sum()))
    assert result["ranks"]["text_to_image"] == expected
    protocol = result["protocol"]
    assert (protocol["images"], protocol["captions"]) == (6, 6)
    assert (protocol["texts"], protocol["pairs"], protocol["shared_captions"]) == (3, 6, 5)
    assert result["retrieval"]["chance_R@1"] == pytest.approx(100 / 3)
    assert "6 images, 6 captions of 3 distinct texts" in out
    assert "5 captions are those of several images, each of which is right" in out
    assert "ties" not in out and not any(result["retrieval"]["ties"].values())
    right_of = {"a cat.": {"0.png", "2.png", "5.png"}, "a dog.": {"1.png", "4.png"}}
    for miss in result["misses"]:
        key = " ".join(miss["caption"].lower().split())
        right = right_of.get(key, {"3.png"})
        assert {p["name"] for p in miss["top"] if p["right"]} == right & {
            p["name"] for p in miss["top"]
        }


def test_images_of_equal_content_tie_and_are_counted(evaluate, captions):
    label_captions(captions, ["A cat.", "A dog.", "An owl."])
    shutil.copy(captions.parent / "0.png", captions.parent / "1.png")
    _, result, out, _ = evaluate("--data", captions)
    ranks = result["ranks"]["text_to_image"]
    assert min(ranks[:2]) >= 2  # of two images that are the same, neither comes first
    assert result["retrieval"]["ties"] == {"image_to_text": 0, "text_to_image": 2}
    assert "ties, which count against the model: 0 image to text, 2 text to image" in out


def test_two_spellings_of_a_path_are_one_image(evaluate, captions):
    rows = ["filepath\ttitle", "0.png\tA cat.", "./0.png\tA dog.", "1.png\tAn owl."]
    captions.write_text("\n".join(rows) + "\n")
    _, result, _, _ = evaluate("--data", captions)
    assert (result["protocol"]["images"], result["protocol"]["captions"]) == (2, 3)
    assert result["protocol"]["positives"] == "1 to 2 captions per image"


def test_himo_docci_from_file_to_result(evaluate, prefixes, checkpoint):
    status, result, out, _ = evaluate("--himo-docci", prefixes, "--batch-size", 3)
    assert status == 0
    rho = []
    for line in map(json.loads, prefixes.read_text().splitlines()):
        path = prefixes.parent / line["img_path"]
        scores = expected_scores(checkpoint, [path], line["caption"])
        steps = torch.arange(1.0, scores.shape[1] + 1)[None]
        rho.append(torch.corrcoef(torch.cat([scores, steps]))[0, 1].item())
    measure = result["himo"]["HiMo@K"]
    assert result["histogram"]["rho"] == pytest.approx(rho, abs=1e-3)
    assert measure["value"] == pytest.approx(sum(rho) / len(rho), abs=1e-3)
    assert (measure["used"], measure["left_out"]) == (IMAGES, 0)
    assert "retrieval" not in result
    assert result["protocol"]["captions"] == sum(2 + number % 4 for number in range(IMAGES))
    assert "HiMo@K, correlation" in out
    assert result["curves"][0]["segments"][1] == "seen here,"

    (prefixes.parent / "3.png").unlink()
    status, result, _, err = evaluate("--himo-docci", prefixes)
    assert (status, result) == (2, None)
    assert "prefixes.jsonl:4: 3.png" in err
    status, result, out, _ = evaluate("--himo-docci", prefixes, "--allow-missing")
    assert result["himo"]["HiMo@K"]["left_out"] == 1
    assert result["coverage"]["left_out"] == {"missing": 1}
    assert result["histogram"]["rho"] == pytest.approx([*rho[:3], *rho[4:]], abs=1e-3)


def test_himo_docci_stands_beside_a_captioned_set(evaluate, captions, prefixes):
    alone = evaluate("--himo-docci", prefixes)[1]["himo"]["HiMo@K"]["value"]
    status, result, out, _ = evaluate("--data", captions, "--himo-docci", prefixes)
    assert status == 0
    assert set(result["himo"]) == {"HiMo@2", "HiMo@3", "HiMo@K", "HiMo-Docci"}
    assert result["himo"]["HiMo-Docci"]["value"] == alone
    assert result["himo"]["HiMo-Docci"]["coverage"]["used"] == IMAGES
    assert "HiMo-Docci, correlation" in out


def test_cola_wants_both_captions_to_find_their_image(evaluate, captions, checkpoint):
    url = "https://example.org/images/{}.png?size=large"
    groups = [
        [url.format(a), f"A {COLOURS[a]} dot", url.format(b), f"A {COLOURS[b]} dot"]
        for a in range(8)
        for b in range(8)
        if a != b
    ]
    path = captions.parent / "cola.json"
    path.write_text(json.dumps(groups))
    status, result, out, _ = evaluate("--cola", path)
    paths = [captions.parent / f"{number}.png" for number in range(8)]
    scores = expected_scores(checkpoint, paths, [f"A {colour} dot" for colour in COLOURS])
    pairs = [(a, b) for a in range(8) for b in range(8) if a != b]
    right = [bool(scores[a, a] > scores[b, a] and scores[b, b] > scores[a, b]) for a, b in pairs]
    assert status == 0
    assert result["cola"]["accuracy"] == 100 * sum(right) / len(right)
    assert 0 < sum(right) < len(right)
    assert "COLA, %" in out

    (captions.parent / "7.png").unlink()
    status, result, _, err = evaluate("--cola", path)
    assert (status, result) == (2, None)
    assert "7.png" in err
    status, result, _, _ = evaluate("--cola", path, "--allow-missing")
    assert (result["cola"]["used"], result["cola"]["left_out"]) == (42, 14)
    kept = [good for good, pair in zip(right, pairs, strict=True) if 7 not in pair]
    assert result["cola"]["accuracy"] == 100 * sum(kept) / len(kept)


def test_equal_tokens_are_encoded_once_and_short_ones_first():
    texts = ["A red dog runs.", "a cat", "A  RED dog runs.", "dog", "a cat"]
    tokens, row, cut = distinct_tokens(texts, 248)
    assert (len(tokens), cut) == (3, 0)
    assert row.tolist() == [2, 1, 2, 0, 1]
    assert torch.equal(torch.from_numpy(tokens.astype("int32"))[row], tokenize(texts))


def test_grouping_keeps_the_order_of_the_data(captions):
    lines = ["filepath\ttitle", "3.png\tC", "1.png\tA  a", "3.png\tB"]
    captions.write_text("\n".join(lines) + "\n")
    index, coverage = open_for_evaluation(captions, allow_missing=False)
    grouped = group_by_image(index, coverage)
    assert grouped.image_rows == [0, 1]
    assert grouped.captions == ["C", "A a", "B"]
    assert grouped.caption_images == [0, 1, 0]
    left = grouped.without({0}, set())
    assert (left.image_rows, left.captions, left.caption_images) == ([1], ["A a"], [0])
    left = grouped.without(set(), {1})
    assert (left.image_rows, left.captions, left.caption_images) == ([0], ["C", "B"], [0, 0])
