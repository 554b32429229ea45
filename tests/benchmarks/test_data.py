"""benchmarks.data as a process: rows of a small measurement, in place of those before."""

import csv

import pytest
from fresh_process import run_python

from benchmarks import data


@pytest.mark.slow
def test_the_rows_of_a_measurement(tmp_path):
    out = tmp_path / "data.csv"
    options = ("--photos", "4", "--records", "3000", "--rounds", "1", "--seconds", "0.05")
    for _ in range(2):
        run_python("-m", "benchmarks.data", "--out", str(out), "--workers", "1", *options)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    cells = [tuple(row[name] for name in data.CELL) for row in rows]
    assert len(set(cells)) == len(cells)
    assert all(tuple(row) == data.COLUMNS and float(row["value"]) >= 0 for row in rows)
    found = {(row["variant"], row["measure"]): float(row["value"]) for row in rows}
    pixels = 224 * 224 * 3
    assert found["files, float32", "handed over"] == pytest.approx((4 * pixels + 992) / 1024, 1e-3)
    assert found["packed, token cache", "handed over"] == pytest.approx((pixels + 992) / 1024, 1e-3)
    steps = [measure for variant, measure in found if variant == "packed, token cache"]
    assert steps == ["decode", "resize and crop", "read tokens", "loader", "handed over"]
    assert {row["count"] for row in rows if row["part"] == "index"} == {"3000"}
    assert found["both", "growth of private memory"] < 16
