"""`himo bench kernels`: what it runs, and what it says without the source tree."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

from himo.cli import main
from himo.tools import bench


def test_it_runs_the_report_of_the_source_tree(monkeypatch):
    calls = []

    def call(command, env):
        calls.append((command, env))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", call)
    given = ["--out", "new", "--baseline", "old", "--minutes", "2", "--fail-on-regression"]
    assert main(["bench", "kernels", *given]) == 1
    ((command, env),) = calls
    assert command[1:] == [
        *("-m", "benchmarks.report", "--out=new", "--baseline=old", "--minutes=2"),
        "--fail-on-regression",
    ]
    assert env["PYTHONPATH"].startswith(str(Path(bench.__file__).parents[2]))
    assert "OMP_WAIT_POLICY" not in env


def test_an_installed_package_says_where_the_benchmarks_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "himo" / "tools" / "bench.py"))
    assert main(["bench", "kernels", "--out", "new"]) == 2
    said = capsys.readouterr().err
    assert "not part of the installed package" in said
    assert "`python -m benchmarks.report --out new` in a clone" in said
