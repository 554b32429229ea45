"""benchmarks.retrieval as a process: the row of a small measurement, in place of the one before."""

import csv

import pytest
from fresh_process import run_python

from benchmarks import retrieval


@pytest.mark.slow
def test_the_row_of_a_measurement(tmp_path):
    out = tmp_path / "retrieval.csv"
    options = ("--images", "40", "--captions-per-image", "3", "--features", "16", "--threads", "1")
    for runs in ("1", "2"):
        run_python("-m", "benchmarks.retrieval", "--out", str(out), *options, "--runs", runs)
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert tuple(row) == retrieval.COLUMNS and all(row.values())
    size = [row[name] for name in ("images", "captions", "features", "runs")]
    assert size == ["40", "120", "16", "2"]
    assert 0 < float(row["time_s_min"]) <= float(row["time_s_p50"])
    assert float(row["cpu_s_min"]) > 0
    assert 0 <= float(row["peak_mib"]) < float(row["resident_mib"])
    assert all(0 <= float(row[f"r1_{way}"]) <= 100 for way in ("image_to_text", "text_to_image"))
