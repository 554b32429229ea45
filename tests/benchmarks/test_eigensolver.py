"""benchmarks.eigensolver: the rows behind the choice of a solver."""

import csv

import pytest

from benchmarks import eigensolver
from himo_kernels import extension

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))


def test_a_row_for_each_size_and_number_of_threads(tmp_path):
    options = ["--out", str(tmp_path), "--threads", "1", "--n", "16", "40", "--seconds", "0.01"]
    assert eigensolver.main(options) == 0
    with open(tmp_path / "eigensolver.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["n"], row["threads"]) for row in rows] == [("16", "1"), ("40", "1")]
    for row in rows:
        assert row["chosen"] == extension.load().eigensolver(int(row["n"]))
        assert all(0 < float(row[f"{name}_ms"]) < 1000 for name in ("himo", "lapack"))
        assert float(row["lapack_float32_ms"]) > 0
