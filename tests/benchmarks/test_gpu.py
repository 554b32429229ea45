"""The sessions of `make gpu` and `make gpus`: order, limits, short dry runs. Needs no GPU."""

import math
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from fresh_process import run_python

from benchmarks import exchange, gpu, gpus, steps
from benchmarks.steps import Step

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, seconds: int = 20) -> Step:
    return Step(name, (sys.executable, "-S", "-c", code), seconds)


def test_a_failed_step_ends_no_other_and_its_output_is_kept(tmp_path, capsys):
    session = [
        [python("fails", "print('before'); raise SystemExit(3)")],
        [Step("absent", ("no-such-program",), 5), python("works", "print('after')")],
    ]
    results = steps.run(session, tmp_path, minutes=1)
    found = {result.name: result.status for result in results}
    assert found == {"fails": "status 3", "absent": "not here: no-such-program", "works": "ok"}
    assert [result.failed for result in results] == [True, False, False]
    assert (tmp_path / "fails.txt").read_text() == "before\n"
    assert (tmp_path / "works.txt").read_text() == "after\n"
    assert (tmp_path / "steps.txt").read_text() == capsys.readouterr().out


def test_a_step_past_its_limit_is_ended_with_all_that_it_started(tmp_path):
    started = f"{tmp_path}/started"
    code = f"""
import signal, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
open({started!r}, "w").write(str(child.pid))
signal.signal(signal.SIGINT, lambda *_: (print("report", flush=True), sys.exit(1)))
time.sleep(60)
"""
    before = time.monotonic()
    (result,) = steps.run([[python("long", code, seconds=2)]], tmp_path, minutes=1)
    assert result.status == "time limit" and result.failed
    assert time.monotonic() - before < 2 + steps.GRACE + 10
    assert (tmp_path / "long.txt").read_text() == "report\n"
    child = int(Path(started).read_text())
    end = time.monotonic() + 10
    while runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(child)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_steps_beside_each_other_overlap(tmp_path):
    wait = f"""
import pathlib, sys, time
mine, other = (pathlib.Path({str(tmp_path)!r}, name) for name in sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""
    group = [
        Step(one, (sys.executable, "-S", "-c", wait, one, two), 20)
        for one, two in (("a", "b"), ("b", "a"))
    ]
    assert [result.status for result in steps.run([group], tmp_path, 1)] == ["ok", "ok"]


def test_no_step_starts_without_time_left(tmp_path):
    (result,) = steps.run([[python("late", "")]], tmp_path, minutes=steps.GRACE / 60)
    assert result.status == "no time left" and not result.failed


def test_a_step_may_leave_time_for_later_ones(tmp_path):
    step = python("long", "import time; time.sleep(30)")
    greedy = Step(step.name, step.command, 60, leaves=48 - steps.GRACE)
    results = steps.run([[greedy], [python("last", "")]], tmp_path, minutes=50 / 60)
    assert [result.status for result in results] == ["time limit", "ok"]
    assert results[0].seconds < 15


def test_the_order_and_the_limits(tmp_path):
    session = gpu.session(tmp_path, minutes=9.5, dry=False)
    names = [[step.name for step in group] for group in session]
    assert names == [
        ["machine", "nvidia-smi"],
        ["warm", "build"],
        ["tests"],
        ["memcheck", "initcheck"],
        ["tune"],
        ["rows-128-1024"],
        ["rows-32768"],
        ["head"],
        ["table"],
        ["more-tests"],
        ["rows-all"],
        ["table"],
    ]
    # All that the first minutes are for fits, whatever the steps before take.
    needed = session[: names.index(["table"]) + 1]
    limits = sum(max(step.seconds for step in group) for group in needed)
    assert limits + steps.GRACE <= 9.5 * 60


def test_the_files_of_the_tests_exist():
    assert all((ROOT / name).exists() for name in gpu.FIRST_TESTS)


def dry_run(module: str, out: Path, *only: str) -> list[tuple[str, str]]:
    """The names and statuses of these steps of a session on this CPU."""
    command = ("-m", f"benchmarks.{module}", "--dry-run", "--out", str(out))
    # The steps that interpret kernels say so themselves.
    told = run_python(*command, "--only", *only, TRITON_INTERPRET="0")
    lines = [line.split() for line in told.splitlines()]
    return [(line[0], line[-1]) for line in lines[: len(only)]]


@pytest.mark.slow
def test_a_short_dry_run(tmp_path):
    out = tmp_path / "out"
    assert dry_run("gpu", out, "machine", "head") == [("machine", "ok"), ("head", "ok")]
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        expected = {"machine.txt", "head.txt", "head.json", "steps.txt"}
        assert expected <= set(tar.getnames())


@pytest.mark.slow
def test_a_dry_run_over_ranks(tmp_path):
    only = ("exchange-2", "rows-2-ring")
    assert dry_run("gpus", tmp_path / "out", *only) == [(name, "ok") for name in only]
    assert "[24, 32] ring official" in (tmp_path / "out" / "exchange-2.txt").read_text()
    assert "global ring" in (tmp_path / "out" / "himo_loss_over_ranks.csv").read_text()


@pytest.mark.parametrize(
    ("devices", "ranks"), [(2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8]), (6, [2, 4, 6])]
)
def test_the_ranks_of_a_session(devices, ranks, tmp_path):
    assert gpus.counts(devices) == ranks
    names = [group[0].name for group in gpus.session(tmp_path, devices, dry=False)]
    assert names[2 : 2 + len(ranks)] == [f"exchange-{count}" for count in ranks]
    assert names[-1] == f"rows-{devices}-ring"


@pytest.mark.parametrize(
    ("transfers", "products", "share"),
    [
        ([(0, 4)], [(2, 6)], 0.5),
        ([(0, 4)], [(1, 2), (1, 3), (3, 3.5)], 0.625),  # two products at once count once
        ([(0, 2), (1, 4)], [(0, 4)], 1.0),
        ([(5, 6), (0, 1)], [(1, 5)], 0.0),
        ([(0, 1)], [], 0.0),
    ],
)
def test_the_share_of_transfers_that_products_hide(transfers, products, share):
    assert exchange.hidden(transfers, products) == share


def test_without_transfers_there_is_no_share():
    assert math.isnan(exchange.hidden([], [(0, 1)]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_and_wrong_names(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert gpus.main(["--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "make gpu: needs a CUDA device" in told and "make gpus: needs two" in told
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--dry-run", "--only", "nothing"])
    assert "expected names of" in capsys.readouterr().err
