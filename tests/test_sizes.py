"""Every file and function outside the tests is short enough to read at once."""

import ast
from collections.abc import Iterator
from pathlib import Path

from fresh_process import PACKAGE

ROOT = PACKAGE.parent
FOLDERS = ("himo_kernels", "himo", "himo_charts", "benchmarks", "examples", "csrc")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".html", ".css", ".md"}
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 90


def _files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in SUFFIXES and "results" not in path.parts:  # written by benchmarks
                yield path


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in _files()}
    assert len(lengths) > 100
    assert {path: n for path, n in lengths.items() if n > MOST_LINES_OF_A_FILE} == {}


def test_the_operator_to_copy_is_short() -> None:
    paths = [
        *(ROOT / "examples/minimal_operator").iterdir(),
        ROOT / "tests/test_minimal_operator.py",
    ]
    lines = [
        line for path in paths if path.suffix == ".py" for line in path.read_text().splitlines()
    ]
    assert 30 < len([line for line in lines if line.strip()]) <= 60


def test_the_operator_to_copy_imports_public_names() -> None:
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                parts = [part for name in names for part in name.split(".")]
                assert not [part for part in parts if part.startswith("_")], path


def test_no_function_is_long() -> None:
    long, count = [], 0
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())) if path.suffix == ".py" else ():
            if isinstance(node, ast.FunctionDef):
                count += 1
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{path}:{node.lineno}: {node.name} has {lines} lines")
    assert count > 1000
    assert long == []
