"""benchmarks.prefixes as a process: the row of a small measurement, in place of the one before."""

import csv
import json

import pytest
from fresh_process import run_python

from benchmarks import prefixes


@pytest.mark.slow
def test_the_row_of_a_measurement(tmp_path):
    data, out = tmp_path / "prefixes.jsonl", tmp_path / "prefixes.csv"
    sentences = ["A red chair.", "It stands in a hall.", "A lamp hangs above it.", "It is on."]
    texts = [" ".join(sentences[:end]) for end in range(1, 5)]
    data.write_text(
        "".join(json.dumps({"img_path": f"{n}.png", "caption": texts[n:]}) + "\n" for n in range(3))
    )
    options = ("--data", str(data), "--out", str(out), "--model", "tiny", "--threads", "1")
    for rounds in ("1", "2"):
        run_python("-m", "benchmarks.prefixes", *options, "--rounds", rounds, "--captions", "3")
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert tuple(row) == prefixes.COLUMNS and all(row.values())
    assert (row["texts"], row["rounds"], row["context"]) == ("9", "2", "248")
    # Four distinct texts of 6, 12, 18 and 22 tokens; once shared, 22 and the ends of the others.
    assert (row["tokens_padded"], row["tokens_sorted"]) == (str(9 * 248), str(4 * 22))
    assert row["tokens_shared"] == str(22 + 3)
    assert float(row["largest_difference"]) <= prefixes.TOLERANCE
    low, middle, high = (float(row[f"sorted_over_shared{end}"]) for end in ("_min", "", "_max"))
    assert 0 < low <= middle <= high
