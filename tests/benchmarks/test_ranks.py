"""benchmarks.ranks as processes: rows of a small cell, and user errors."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_python

from benchmarks import plot
from benchmarks import rows as table

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rows") / "new"
    run_python(
        *("-m", "benchmarks.ranks", "--ranks", "2", "--n", "8", "--seconds", "0.01"),
        *("--out", str(out)),
        TRITON_INTERPRET="0",
    )
    return out


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[table.Row]:
    with (folder / "himo_loss_over_ranks.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_losses_agree_and_are_timed(rows):
    assert all(tuple(row) == table.COLUMNS for row in rows)
    assert all(row["status"] == "ok" for row in rows), [row["reason"] for row in rows]
    names = {row["config"]: set() for row in rows}
    for row in rows:
        names[row["config"]].add(row["backend"])
        assert float(row["error"]) <= 1e-3 and int(row["repeats"]) >= 5
        assert 0 < float(row["time_ms_min"]) <= float(row["time_ms_p50"])
    others = {"released", "open_clip, gather_with_grad"}
    assert names["ranks=2 local"] - names["ranks=2 global"] == others
    assert "reference" in names["ranks=2 global"]
    assert sum(row["auto"] == "yes" for row in rows) == 2


@pytest.mark.slow
def test_the_table_holds_them(folder):
    text = plot.markdown(plot.read_folder(folder))
    (line,) = (line for line in text.splitlines() if "ranks=2 local" in line)
    assert "whole head over ranks, rows of one 8 x 768" in line and "gather_with_grad" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "1"], "argument --ranks: expected at least 2, got 1"),
        (["--n", "0"], "argument --n: expected at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "benchmarks.ranks", *arguments, "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_files_columns_are_kept_as_they_are(tmp_path):
    path = tmp_path / "himo_loss_over_ranks.csv"
    path.write_text("a,b\n1,2\n")
    command = [sys.executable, "-m", "benchmarks.ranks", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "expected the columns of benchmarks/rows.py" in run.stderr
    assert path.read_text() == "a,b\n1,2\n"
