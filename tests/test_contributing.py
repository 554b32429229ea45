"""The recipe of CONTRIBUTING.md for a backend, followed in a copy of the tree."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name for name in ("himo_kernels", "himo_charts", "benchmarks", "tests")]
FILES = [ROOT / name for name in ("CONTRIBUTING.md", "pyproject.toml")]

# The tests that read the tables.
TESTS = [
    f"tests/{name}.py"
    for name in ("test_dispatch", "test_imports", "test_operators", "covariance/test_covariance")
]

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in FOLDERS + FILES), reason="needs the source tree"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the backend of the recipe."""
    tree = tmp_path_factory.mktemp("tree")
    for path in FOLDERS:
        leave_out = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(path, tree / path.name, ignore=leave_out)
    for path in FILES:
        shutil.copy(path, tree)
    recipe = (tree / "CONTRIBUTING.md").read_text().split("## Add a backend")[1].split("\n## ")[0]
    assert "himo_kernels/covariance/einsum.py" in recipe
    backend, changes = re.findall(r"(?s)```python\n(.*?)```", recipe)
    (tree / "himo_kernels/covariance/einsum.py").write_text(backend)
    table = tree / "himo_kernels/covariance/op.py"
    text = table.read_text()
    imports, row = changes.splitlines(keepends=True)
    old_imports = "from himo_kernels.covariance import cpu, reference\n"
    last_row = '        "reference": Backend.of(reference, "gram")'
    assert text.count(old_imports) == text.count(last_row) == 1
    table.write_text(text.replace(old_imports, imports).replace(last_row, row + last_row))
    return tree


def python(tree: Path, *arguments: str) -> str:
    """Returns what `python *arguments` prints in the copy."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path, "HIMO_KERNELS_BACKEND": "auto"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_new_backend_passes_the_tests_that_read_the_tables(tree: Path) -> None:
    options = ["-v", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    passed = python(tree, "-m", "pytest", *options, "-k", "einsum or backend", *TESTS)
    for name in TESTS:
        assert re.search(rf"{name}::\S*einsum\S* PASSED", passed), name


@pytest.mark.slow
def test_info_lists_the_new_backend_without_a_word_about_hardware(tree: Path) -> None:
    report = python(tree, "-m", "himo_kernels.info")
    on_cpu = report.split("operators on cpu")[1].split("\n\n")[0]
    told = [line.strip() for line in on_cpu.splitlines() if line.startswith("    einsum ")]
    assert told.count("einsum     by name only") == 1  # of gram; the other operators lack it
    assert told.count("einsum     no: pca has no einsum kernel") == 1
