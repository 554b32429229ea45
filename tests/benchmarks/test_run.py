"""benchmarks.run as a process: rows of real cells, and user errors."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_python

from benchmarks import rows as table
from benchmarks.cases import MODES, OPTIONS, full_run
from himo_kernels.dispatch import OPERATORS

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[table.Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one small cell, every candidate but the compiled ones."""
    out = tmp_path_factory.mktemp("rows")
    # Time enough for every baseline on any machine: most of it is the start of their processes.
    cell = ["--op", "info_nce", "--n", "48", "--d", "16", "--seconds", "0.02"]
    cell += ["--baseline-seconds", "100"]
    run_python("-m", "benchmarks.run", *cell, "--no-compile", "--out", str(out))
    return out


@pytest.mark.slow
def test_every_candidate_has_a_whole_row_in_each_mode(folder):
    rows = read(folder / "info_nce.csv")
    assert all(tuple(row) == table.COLUMNS for row in rows)
    expected = set(OPERATORS["info_nce"].backends) | {
        "open_clip", "linear_cross_entropy", "inf_cl", "liger", "liger_sm90", "quack",
    }  # fmt: skip
    for mode in MODES:
        assert {row["backend"] for row in rows if row["mode"] == mode} == expected
    timed = [row for row in rows if row["status"] == "ok"]
    assert {"reference", "open_clip"} <= {row["backend"] for row in timed}
    for row in timed:
        low, high = float(row["time_ms_min"]), float(row["time_ms_p80"])
        assert 0 < low <= float(row["time_ms_p50"]) <= high
        assert float(row["peak_mib"]) > 0 and int(row["repeats"]) >= 3
        assert float(row["error"]) < 1e-3 and row["checked_n"] == "48"
        assert float(row["fraction"]) > 0 and row["bound"] in ("compute", "memory")
        # 8 N^2 D with the backward, over the median.
        flops = (8 if row["mode"] == "fwd+bwd" else 2) * 48**2 * 16
        assert float(row["tflops"]) * float(row["time_ms_p50"]) * 1e9 == pytest.approx(flops, 1e-2)
        assert row["device"] and row["torch"] and row["date"] and row["load"]
    assert sum(row["auto"] == "yes" for row in timed) == len(MODES)


@pytest.mark.parametrize(
    "others", [["--all"], ["--op", "info_nce", "--n", "16", "--device", "cuda"]]
)
def test_once_is_of_chosen_cells_on_a_cpu(tmp_path, capsys, others):
    from benchmarks.run import main

    assert main(["--once", "--out", str(tmp_path / "out"), *others]) == 2
    assert "--once: expected --op and --n on a CPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("memory", [[], ["--no-memory"]], ids=["memory", "no-memory"])
def test_once_times_one_run_of_each_compiled_or_not(tmp_path, memory):
    samples = 1024
    cell = ["--op", "info_nce", "--n", str(samples), "--d", "16", "--mode", "fwd+bwd", "--once"]
    chosen = ["--backend", "cpu", "open_clip", "open_clip+compile"]
    run_python("-m", "benchmarks.run", *cell, *memory, *chosen, "--out", str(tmp_path))
    rows = {row["backend"]: row for row in read(tmp_path / "info_nce.csv")}
    assert set(rows) == {"cpu", "open_clip", "open_clip+compile"}
    for row in rows.values():
        assert (row["status"], row["timing"], row["repeats"]) == ("ok", "once", "1")
        assert float(row["time_ms_min"]) > 0
    # A few matrices of logits, without what compiling takes; a MiB less is noise.
    matrix = samples**2 * 4 / 2**20
    for name in ("open_clip", "open_clip+compile"):
        peak = rows[name]["peak_mib"]
        assert peak == "" if memory else matrix - 1 < float(peak) < 6 * matrix


@pytest.mark.slow
def test_a_refused_candidate_is_a_row_with_its_reason(folder):
    (row,) = (
        row
        for row in read(folder / "info_nce.csv")
        if (row["backend"], row["mode"]) == ("inf_cl", "fwd")
    )
    assert (row["status"], row["reason"], row["time_ms_p50"]) == (
        "refused", "needs a CUDA device", "",
    )  # fmt: skip


@pytest.mark.slow
def test_the_log_names_every_row(folder):
    log = (folder / "log.txt").read_text()
    assert "ceilings:" in log
    assert log.count("info_nce ") >= len(read(folder / "info_nce.csv"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "expected --all, or --op and --n"),
        (["--all", "--op", "gram", "--out", "x"], "expected no --op"),
        (["--op", "gram", "--n", "0", "--out", "x"], "expected at least 1, got 0"),
        (["--op", "gram", "--n", "4", "--tau", "1.5", "--out", "x"], "expected a number in (0, 1]"),
        (["--op", "svd", "--n", "4", "--out", "x"], "invalid choice: 'svd'"),
        (["--op", "info_nce", "--n", "4", "--batch", "2", "--out", "x"], "one problem only"),
        (["--op", "gram", "--n", "4", "--out", "/dev/null/x"], "--out /dev/null/x: "),
        (["--device", "cuda", "--all", "--out", "x"], "sees no CUDA device"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, tmp_path, capsys, monkeypatch):
    from benchmarks.run import main

    monkeypatch.chdir(tmp_path)
    if "cuda" in arguments and table.torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    try:
        status = main(arguments)
    except SystemExit as exit:  # from argparse, which prints the usage first
        status = exit.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and message in last and "error: " in last
    assert not any(tmp_path.iterdir())


def test_rows_of_another_format_are_refused_and_untouched(tmp_path, capsys):
    from benchmarks.run import main

    (tmp_path / "gram.csv").write_text("a,b\n1,2\n")
    assert main(["--op", "gram", "--n", "4", "--out", str(tmp_path)]) == 2
    assert "expected the columns" in capsys.readouterr().err
    assert (tmp_path / "gram.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the source tree")
def test_make_gpu_without_a_gpu_says_so(tmp_path):
    if table.torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    # -o: as if the extension were already built.
    command = ["make", "-o", "in-place", "gpu", f"PYTHON={sys.executable}", "VENV="]
    command.append(f"GPU_OUT={tmp_path / 'out'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "make gpu: needs a CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_measuring_needs_neither_himo_nor_tqdm(folder):
    # A machine with a GPU may have only torch, triton, numpy and pytest.
    script = """
import sys
for name in ("himo", "tqdm", "numpy", "regex", "PIL"):
    sys.modules[name] = None
from benchmarks import plot, run, worker
with run.progress(2) as bar:
    bar.set_description_str("a cell")
    bar.update()
sys.exit(plot.main([sys.argv[1], "--markdown"]))
"""
    assert "| InfoNCE 48 x 16 | float32 |" in run_python("-c", script, str(folder))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_full_run_has_each_cell_once_and_every_operator(device):
    cases = full_run(device)
    cells = [(case.op, case.B, case.N, case.D, case.dtype, case.config) for case in cases]
    assert len(cells) == len(set(cells))
    assert {case.op for case in cases} == set(OPTIONS)
    assert [case.priority for case in cases] == sorted(case.priority for case in cases)
