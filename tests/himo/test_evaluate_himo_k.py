"""HiMo@K of series of scores, and the prefixes of HiMo-Docci as its file gives them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from himo.errors import HimoError
from himo.evaluate.himo_k import added_text, himo_at, himo_k, read_himo_docci

HIMO_DOCCI = Path(__file__).parents[3] / "shared" / "data" / "himo_docci.jsonl"


def series(*rows):
    return [torch.tensor(row) for row in rows]


def test_himo_at_reads_the_scores_at_the_segment_boundaries():
    # 5 sentences in 3 segments end after 1, 3 and 5: the dip at sentence 2 is not seen.
    five = [0.2, 0.1, 0.3, 0.0, 0.4]
    assert himo_at(series(five), 3) == {"value": 100.0, "used": 1, "left_out": 0}
    # In 2 segments they end after 2 and 5.
    assert himo_at(series([0.2, 0.4, 0.3, 0.0, 0.4]), 2)["value"] == 0.0


def test_captions_with_fewer_sentences_are_left_out_and_counted():
    scores = series([0.1], [0.1, 0.2], [0.2, 0.1], [0.1, 0.2, 0.3], [])
    assert himo_at(scores, 2) == {"value": 100 * 2 / 3, "used": 3, "left_out": 2}
    assert himo_at(scores, 3) == {"value": 100.0, "used": 1, "left_out": 4}
    assert himo_at(scores[:1], 3) == {"value": None, "used": 0, "left_out": 1}


def test_himo_k_averages_the_correlations_of_captions_of_more_than_3_sentences():
    up, down, flat = [1.0, 2.0, 3.0, 4.0], [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    result = himo_k(series(up, [1.0, 2.0, 3.0], down, flat, up))
    assert result["K"] == [4, 5, 4, 4]
    assert result["rho"] == pytest.approx([1, -1, 0, 1])
    assert result["value"] == pytest.approx(0.25)
    assert (result["used"], result["left_out"]) == (4, 1)


def test_himo_k_of_given_prefixes_takes_every_k():
    result = himo_k(series([1.0, 2.0], [3.0, 2.0, 1.0], [1.0] * 17), more_than=1)
    assert (result["K"], result["left_out"]) == ([2, 3, 17], 0)
    assert result["value"] == pytest.approx(0)


def test_himo_k_of_nothing_is_none_and_not_zero():
    result = himo_k(series([1.0, 2.0, 3.0]))
    assert result == {"value": None, "used": 0, "left_out": 1, "K": [], "rho": []}


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        ("", "A dog.", "A dog."),
        ("A dog.", "A dog. It runs.", "It runs."),
        ("A dog.", "A dog, black.", ", black."),
        ("A dog sits.", "A dog sleeps.", "sleeps."),
        ("Cats", "Dogs", "Dogs"),
        ("The same.", "The same.", ""),
    ],
)
def test_added_text(before, after, added):
    assert added_text(before, after) == added


def line(image="a.jpg", caption=("A.", "A. B."), **more):
    return json.dumps({"img_path": image, "caption": list(caption), **more})


def test_lines_are_read_with_their_place(tmp_path):
    path = tmp_path / "prefixes.jsonl"
    path.write_text(f"{line(raw_caption='A. B.')}\n\n{line('b/c.jpg', ['X', 'X  y ', 'X y z'])}\n")
    (first, second), coverage = read_himo_docci(path)
    assert (first.place, first.image, first.prefixes) == (f"{path}:1", "a.jpg", ["A.", "A. B."])
    assert (second.place, second.prefixes) == (f"{path}:3", ["X", "X y", "X y z"])
    assert second.segments() == ["X", "y", "z"]
    assert (coverage.used, coverage.total) == (2, 2)


BAD_LINES = {
    "one prefix": (line(caption=["A."]), "caption_count", "2 to 120 texts"),
    "no prefix": (line(caption=[]), "caption_count", "2 to 120 texts"),
    "caption is text": ('{"img_path": "a", "caption": "A. B."}', "caption_count", "'A. B.'"),
    "empty prefix": (line(caption=["A.", " "]), "empty", "empty"),
    "number": (line(caption=["A.", 3]), "type", "caption 2 is 3"),
    "no image": ('{"caption": ["A.", "B."]}', "type", "no img_path and caption"),
    "list": ("[1, 2]", "type", "no img_path and caption"),
    "cut off": (line()[:-3], "syntax", "not valid JSON"),
    "121 prefixes": (line(caption=["A."] * 121), "caption_count", "2 to 120 texts"),
    "long prefix": (line(caption=["A.", "a" * 8193]), "too_long", "caption 2 has 8,193 characters"),
    "NaN": ('{"img_path": NaN, "caption": ["A.", "B."]}', "type", "img_path is nan"),
    "deep": ("[" * 100_000, "syntax", ""),
    "surrogate": (line(caption=["A.", "\ud800"]), "encoding", "UTF-8"),
}


@pytest.mark.parametrize(("bad", "reason", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_an_error_with_its_number_or_counted(tmp_path, bad, reason, message):
    path = tmp_path / "prefixes.jsonl"
    path.write_text(f"{line()}\n{bad}\n{line()}\n")
    with pytest.raises(HimoError, match=f"prefixes.jsonl:2: .*{message}.*--allow-missing"):
        read_himo_docci(path)
    records, coverage = read_himo_docci(path, allow_missing=True)
    assert len(records) == coverage.used == 2
    assert (coverage.total, coverage.left_out) == (3, {reason: 1})
    assert coverage.examples[0].startswith(f"{path}:2: ")


def test_a_file_without_a_good_line_is_an_error_even_then(tmp_path):
    path = tmp_path / "prefixes.jsonl"
    path.write_text("{}\n")
    with pytest.raises(HimoError, match="none of 1 can be evaluated, the first: .*:1: "):
        read_himo_docci(path, allow_missing=True)


@pytest.mark.skipif(not HIMO_DOCCI.exists(), reason="the captions of HiMo-Docci are not here")
def test_the_published_file_is_read_whole():
    records, coverage = read_himo_docci(HIMO_DOCCI)
    lengths = Counter(len(record.prefixes) for record in records)
    assert (coverage.used, coverage.total, coverage.left_out) == (1000, 1000, {})
    assert sum(size * count for size, count in lengths.items()) == 6660
    assert (min(lengths), max(lengths)) == (2, 17)
    assert [lengths[size] for size in (4, 5, 6, 7)] == [101, 193, 247, 155]
    assert len({record.image for record in records}) == 1000
    # Each text is at least as long as what the segments say it adds.
    assert all(record.segments()[0] == record.prefixes[0] for record in records)
    assert all(
        text.endswith(added)
        for record in records
        for text, added in zip(record.prefixes, record.segments(), strict=True)
    )
    # A perfect model: the number of characters grows along each line, or nearly so.
    scores = [torch.tensor([float(len(t)) for t in record.prefixes]) for record in records]
    result = himo_k(scores, more_than=1)
    assert (result["used"], result["left_out"]) == (1000, 0)
    assert result["value"] > 0.95
