"""benchmarks.train_step as a process: the rows of a small measurement, in place of those before."""

import csv
import json

import pytest
from fresh_process import run_python

from benchmarks import train_step


@pytest.mark.slow
def test_the_rows_of_a_measurement(tmp_path):
    data, out = tmp_path / "captions.jsonl", tmp_path / "train_step.csv"
    texts = [f"A red chair, number {n}. " + "It stands in a hall. " * (n % 5) for n in range(8)]
    data.write_text(
        "".join(
            json.dumps({"img_path": f"{n}.png", "caption": ["A red chair.", text.strip()]}) + "\n"
            for n, text in enumerate(texts)
        )
    )
    options = ("--data", str(data), "--out", str(out), "--model", "tiny", "--threads", "1")
    for rounds in ("1", "2"):
        run_python("-m", "benchmarks.train_step", *options, "--rounds", rounds, "--batch-size", "8")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 12 and all(tuple(row) == train_step.COLUMNS for row in rows)
    ways = {way: [row for row in rows if row["way"] == way] for way in train_step.WAYS}
    assert [row["part"] for row in ways["himo"]] == [row["part"] for row in ways["released"]]
    assert {row["tokens"] for row in ways["released"]} == {str(8 * 248)}
    # Texts of 9 to 33 tokens, each in a group of 16, 32 or 48.
    assert {row["tokens"] for row in ways["himo"]} == {str(16 * (2 + 2 + 2 + 2 * 2 + 1 * 3))}
    for way in ways.values():
        *parts, step = way
        assert step["part"] == "step" and step["rounds"] == "2"
        assert float(step["time_s"]) <= 1.01 * sum(2 * float(part["time_s"]) for part in parts)
        assert float(step["peak_mib"]) == max(float(part["peak_mib"]) for part in parts)
        assert all(float(part["time_s"]) > 0 for part in parts)
    losses = [float(row["loss"]) for row in rows]
    assert max(losses) - min(losses) <= train_step.TOLERANCE * max(losses)
    assert all(bool(row["released_over_himo"]) == (row["way"] == "himo") for row in rows)
