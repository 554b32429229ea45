"""What `himo eval` says of what it cannot use: it leaves nothing out in silence."""

import re
import time

import pytest
import torch
from evaluate_cases import IMAGES, Command, write_captions, write_checkpoint
from PIL import Image

from himo.checkpoint import load
from himo.errors import HimoError
from himo.evaluate import Encoder, evaluate_captions, open_for_evaluation
from himo.evaluate.encode import Coverage
from himo.evaluate.metrics import (
    MAX_SEGMENTS,
    caption_segments,
    segment_boundaries,
)
from himo.evaluate.retrieval import retrieval
from himo.evaluate.sentences import split_sentences
from himo.tokenizer import TextError, Tokenizer, tokenize


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture
def captions(tmp_path):
    return write_captions(tmp_path)


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    return Command(checkpoint, tmp_path, capsys)


def test_captions_per_image_takes_the_first_ones_and_wants_as_many(evaluate, captions):
    lines = captions.read_text().splitlines()
    doubled = lines + [f"{row.split(chr(9))[0]}\tAnother." for row in lines[1:]] + ["3.png\tThird."]
    captions.write_text("\n".join(doubled) + "\n")
    status, result, _, _ = evaluate("--data", captions, "--captions-per-image", 2)
    assert status == 0
    assert result["protocol"]["positives"] == "2 captions per image"
    assert result["coverage"]["left_out"] == {"further_captions": 1}
    assert result["coverage"]["used"] == 2 * IMAGES

    captions.write_text("\n".join(doubled[:-2]) + "\n")
    status, result, _, err = evaluate("--data", captions, "--captions-per-image", 2)
    assert (status, result) == (2, None)
    assert "13.png: expected 2 captions, got 1" in err
    status, result, _, _ = evaluate(
        "--data", captions, "--captions-per-image", 2, "--allow-missing"
    )
    assert result["coverage"]["left_out"] == {"caption_count": 1}
    assert result["protocol"]["images"] == IMAGES - 1


def _remove(path):
    path.unlink()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def _replace(path):
    path.write_text("not an image")


def _make_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_remove, "missing"),
        (_cut, "truncated"),
        (_replace, "unknown_format"),
        (_make_directory, "not_a_file"),
    ],
)
def test_a_bad_image_is_an_error_or_counted(evaluate, captions, spoil, reason):
    whole = evaluate("--data", captions)[1]
    spoil(captions.parent / "4.png")
    status, result, out, err = evaluate("--data", captions)
    assert (status, result, out) == (2, None, "")
    assert err.count("\n") == 1
    assert err.startswith("himo: error: ")
    assert "4.png" in err
    assert "--allow-missing" in err

    status, result, out, err = evaluate("--data", captions, "--allow-missing")
    assert (status, err) == (0, "")
    coverage = result["coverage"]
    assert (coverage["used"], coverage["total"]) == (IMAGES - 1, IMAGES)
    assert coverage["left_out"] == {reason: 1}
    assert "4.png" in coverage["examples"][0]
    assert f"used {IMAGES - 1} of {IMAGES} records" in out
    assert f"left out: 1 {reason}" in out
    assert len(result["ranks"]["image_to_text"]) == IMAGES - 1
    # The images that are left keep their own scores: 4.png had 5 sentences.
    rho = whole["histogram"]["rho"]
    assert result["histogram"]["rho"] == pytest.approx([rho[0], *rho[2:]], abs=1e-4)


def test_images_missing_from_the_start_are_an_error_or_counted(evaluate, captions):
    for number in (2, 6):
        (captions.parent / f"{number}.png").unlink()
    status, result, _, err = evaluate("--data", captions)
    assert (status, result) == (2, None)
    assert f"2 of {IMAGES} images are missing: 2.png; --allow-missing" in err
    _, result, _, _ = evaluate("--data", captions, "--allow-missing")
    coverage = result["coverage"]
    assert (coverage["used"], coverage["total"]) == (IMAGES - 2, IMAGES)
    assert coverage["left_out"] == {"missing": 2}


def test_a_malformed_record_is_an_error_or_counted(evaluate, captions):
    captions.write_text(captions.read_text() + "../out.png\tA dog.\n9.png\t\n")
    status, result, _, err = evaluate("--data", captions)
    assert (status, result) == (2, None)
    assert f"captions.csv:{IMAGES + 2}" in err
    status, result, _, _ = evaluate("--data", captions, "--allow-missing")
    assert status == 0
    assert result["coverage"]["total"] == IMAGES + 2
    assert sum(result["coverage"]["left_out"].values()) == 2
    assert len(result["coverage"]["left_out"]) == 2


def test_without_any_image_left_there_is_no_result(evaluate, captions):
    for path in captions.parent.glob("*.png"):
        path.unlink()
    status, result, _, err = evaluate("--data", captions, "--allow-missing")
    assert (status, result) == (2, None)
    assert "no sample is left" in err


def test_features_that_are_not_finite_are_an_error_or_counted(captions, checkpoint):
    model, preprocess = load(checkpoint)
    Image.new("RGB", (40, 40), "white").save(captions.parent / "2.png")
    words = captions.read_text().replace("A red dot", "A zebra dot", 1)
    captions.write_text(words)
    zebra_row = words[: words.index("zebra")].count("\n") - 1

    def spoil(module, inputs, features):
        features[(inputs[0] > 1.5).all(dim=(1, 2, 3))] = torch.inf
        return features

    model.visual.register_forward_hook(spoil)
    (token,) = tokenize("zebra", context_length=3)[0][1:2].tolist()
    encoder = Encoder(model, preprocess, batch_size=4, progress=False)
    strict = open_for_evaluation(captions, allow_missing=False)
    with pytest.raises(HimoError, match=r"captions.csv:4: 2.png: features are not finite; --allow"):
        evaluate_captions(encoder, *strict)
    lenient = open_for_evaluation(captions, allow_missing=True)
    result = evaluate_captions(encoder, *lenient)
    assert result.coverage.left_out == {"not_finite": 1}
    assert len(result.captions.image_rows) == IMAGES - 1

    model.token_embedding.weight.data[token] = torch.nan
    result = evaluate_captions(encoder, *open_for_evaluation(captions, allow_missing=True))
    assert result.coverage.left_out == {"not_finite": 2}
    expected = [row for row in range(IMAGES) if row not in (2, zebra_row)]
    assert result.captions.image_rows == result.captions.caption_rows == expected
    assert len(result.sections["ranks"]["text_to_image"]) == IMAGES - 2
    Image.new("RGB", (40, 40), "black").save(captions.parent / "2.png")
    line = f"captions.csv:{zebra_row + 2}: .*features of its caption are not finite"
    with pytest.raises(HimoError, match=line):
        evaluate_captions(encoder, *open_for_evaluation(captions, allow_missing=False))


def test_a_prefix_whose_features_are_not_finite_spoils_its_caption(captions, checkpoint):
    model, preprocess = load(checkpoint)
    row = 9
    index, coverage = open_for_evaluation(captions, allow_missing=True)
    states = []
    model.ln_final.register_forward_hook(lambda module, inputs, state: states.append(state))
    with torch.no_grad():
        model.encode_text(tokenize(split_sentences(index[row].caption)[0]))

    def spoil(module, inputs, state):
        state[((state - states[0]).abs() < 1e-4).all(dim=-1)] = torch.nan
        return state

    model.ln_final.register_forward_hook(spoil)
    result = evaluate_captions(Encoder(model, preprocess, progress=False), index, coverage)
    assert result.coverage.left_out == {"not_finite": 1}
    assert result.captions.caption_rows == [other for other in range(IMAGES) if other != row]


def test_half_precision_models_are_scored_in_float32(captions, checkpoint):
    model, preprocess = load(checkpoint, dtype=torch.bfloat16)
    encoder = Encoder(model, preprocess, progress=False)
    index, coverage = open_for_evaluation(captions, allow_missing=False)
    result = evaluate_captions(encoder, index, coverage)
    assert all(scores.dtype == torch.float32 for scores in result.series)
    images = encoder.images(index, range(IMAGES), coverage.leave_out)
    assert images.dtype == torch.float32
    assert torch.allclose(images.norm(dim=1), torch.ones(IMAGES), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["u/0.png", "A.", "u/1.png"]]', "group 1: expected .url, caption, url, caption."),
        ('[["u/0.png", "A.", "u/1.png", ""]]', "group 1: an image or a caption is empty"),
        ('[["u/", "A.", "u/1.png", "B."]]', "group 1: an image or a caption is empty"),
        ('[["http://[", "A.", "u/1.png", "B."]]', "group 1: .* is not a URL"),
        ("[]", "expected a list of groups"),
        ("{", "expected a JSON list"),
        ("[" * 100_000, "expected a JSON list"),
    ],
)
def test_a_bad_cola_file_is_one_clear_line(evaluate, captions, text, message):
    path = captions.parent / "cola.json"
    path.write_text(text)
    status, result, _, err = evaluate("--cola", path)
    assert (status, result) == (2, None)
    assert err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--data, --himo-docci or --cola"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
        (["--data", "captions.csv", "--out", "no/such/folder/eval.json"], "cannot be written"),
        (["--data", "captions.csv", "--batch-size", "0"], "batch_size: expected at least 1"),
        (["--data", "captions.csv", "--workers", "0"], "workers: expected at least 1"),
        (["--data", "captions.csv", "--captions-per-image", "0"], "captions_per_image: expected"),
        (["--data", "captions.csv", "--pretrained", "nowhere.pt"], "nowhere.pt"),
        (["--himo-docci", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_clear_line(evaluate, captions, monkeypatch, options, message):
    monkeypatch.chdir(captions.parent)
    status, result, out, err = evaluate(*options)
    assert (status, result, out) == (2, None, "")
    assert err.startswith("himo: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_texts_beyond_the_context_are_counted(evaluate, captions):
    long = " ".join(f"Sentence number {n} is here." for n in range(60))
    captions.write_text(captions.read_text() + f"0.png\t{long}\n")
    status, result, out, err = evaluate("--data", captions)
    assert (status, err) == (0, "")
    # 10 sentences of 6 tokens, then 26 of 7 with a second digit, fit between start and end.
    assert result["protocol"]["texts_cut"] == 60 - 36
    assert "24 texts were cut after 248 tokens" in out


@pytest.mark.parametrize("unit", ["a. ", "é. ", "&amp;amp; b. "])
def test_a_caption_of_thousands_of_sentences_takes_bounded_time(evaluate, captions, unit):
    caption = (unit * 2730)[:8190].strip()
    captions.write_text(captions.read_text() + f"0.png\t{caption}\n")
    start = time.process_time()
    status, result, out, err = evaluate("--data", captions)
    assert (status, err) == (0, "")
    assert time.process_time() - start < 20
    assert result["protocol"]["captions_segmented"] == 1
    assert "1 captions of over 120 sentences: in as many segments" in out
    assert max(result["histogram"]["K"]) == 120


def test_a_number_that_python_does_not_convert_is_a_caption_like_any_other(evaluate, captions):
    captions.write_text(captions.read_text() + f"0.png\t&#{'9' * 4301}\n")
    status, result, _, err = evaluate("--data", captions)
    assert (status, err) == (0, "")
    assert result["coverage"]["used"] == IMAGES + 1 and result["coverage"]["left_out"] == {}


def test_a_caption_that_cannot_be_read_is_left_out_and_counted(evaluate, captions, monkeypatch):
    encode = Tokenizer.encode

    def refuses(self, text):
        if "red" in text:
            raise TextError("text cannot be read")
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", refuses)
    status, _, _, err = evaluate("--data", captions)
    assert status == 2 and "captions.csv:" in err and "text cannot be read; --allow" in err
    status, result, _, err = evaluate("--data", captions, "--allow-missing")
    assert (status, err) == (0, "")
    coverage = result["coverage"]
    red = captions.read_text().count("red")
    assert 0 < coverage["left_out"]["text"] <= red
    assert coverage["used"] + coverage["left_out"]["text"] == IMAGES


def test_segments_of_many_sentences_leave_himo_at_2_and_3_as_they_are():
    sentences = [f"Sentence {number}." for number in range(1000)]
    segments = caption_segments(" ".join(sentences))
    assert len(segments) == MAX_SEGMENTS and " ".join(segments) == " ".join(sentences)
    assert caption_segments(" ".join(sentences[:120])) == sentences[:120]
    for parts in (2, 3):
        ends = segment_boundaries(len(segments), parts)
        exact = segment_boundaries(len(sentences), parts)
        assert [" ".join(segments[:end]) for end in ends] == [
            " ".join(sentences[:end]) for end in exact
        ]


def test_retrieval_wants_one_image_for_each_text():
    with pytest.raises(HimoError, match="image of each of 3 texts, got 2"):
        retrieval(torch.ones(2, 4), torch.ones(3, 4), [0, 1])


def test_retrieval_wants_one_text_for_each_caption_by_first_occurrence():
    with pytest.raises(HimoError, match="text of each of 2 texts, got 1"):
        retrieval(torch.ones(2, 4), torch.ones(2, 4), [0, 1], [0])
    with pytest.raises(HimoError, match="from 0 on in order of first occurrence"):
        retrieval(torch.ones(2, 4), torch.ones(2, 4), [0, 1], [1, 0])


def test_coverage_adds_up():
    coverage = Coverage(10, allow_missing=True)
    coverage.leave_out("missing", "a: missing", 3)
    coverage.set_aside("further_captions", 2)
    assert coverage.used + sum(coverage.left_out.values()) == coverage.total
    with pytest.raises(HimoError, match="b: gone; --allow-missing"):
        Coverage(10, allow_missing=False).leave_out("missing", "b: gone")
