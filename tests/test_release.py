"""What a release states, and what its archive, workflows and issue templates hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from himo_kernels._version import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
TEMPLATES = sorted(ROOT.glob(".github/ISSUE_TEMPLATE/*.yml"))

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def read_yaml(path: Path) -> Any:
    yaml = pytest.importorskip("yaml")
    # BaseLoader: YAML 1.1 reads the key `on` as a boolean.
    return yaml.load(path.read_text(), Loader=yaml.BaseLoader)


def test_every_place_names_the_same_version() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    releases = re.findall(r"^## \[(.+?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert releases[0] == (__version__, citation["date-released"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    date.fromisoformat(citation["date-released"])


def test_a_release_opens_with_a_short_summary() -> None:
    text = (ROOT / "CHANGELOG.md").read_text().split(f"## [{__version__}]")[1]
    summary = text.split("\n", 1)[1].split("\n### ")[0].strip().splitlines()
    assert 5 <= len(summary) <= 12


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """The files of the tree that git keeps."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and its folder")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in out.split("\0") if name and (ROOT / name).is_file()}


def test_the_source_distribution_holds_every_file_and_nothing_else(
    tracked: set[str], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    left = ["himo_kernels/_C.so", "csrc/one.o", "tests/__pycache__/one.cpython-311.pyc"]
    left += ["benchmarks/results/cpu/log.txt", "build/lib/one.py"]
    for name in left:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        cwd=tree,
        env=os.environ | {"HIMO_KERNELS_NO_EXTENSION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tree.glob("dist/*.tar.gz")
    assert archive.name == f"himo_kernels-{__version__}.tar.gz"
    with tarfile.open(archive) as packed:
        files = {m.name.partition("/")[2] for m in packed if m.isfile()}
    made = {name for name in files if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert files - made == tracked


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_and_pinned_actions_alone(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
    for step in steps:
        assert len({"run", "uses"} & set(step)) == 1
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
        else:
            assert re.fullmatch(r"make [a-z-]+", step["run"])
            assert step["run"].split()[1] in make_targets()
    assert any("run" in step for step in steps)


def test_the_workflows_are_those_of_a_release() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "test", "wheels"]


def test_every_make_target_has_a_line_of_help() -> None:
    help_text = (ROOT / "Makefile").read_text().split("\nhelp:")[1].split("\n\n")[0]
    told = set(re.findall(r"make ([a-z-]+)", help_text))
    assert make_targets() - {"help", "in-place"} <= told


@pytest.mark.parametrize(
    "path", [path for path in TEMPLATES if path.stem != "config"], ids=lambda path: path.stem
)
def test_an_issue_template_is_a_form(path: Path) -> None:
    form = read_yaml(path)
    assert form["name"] and form["description"] and form["labels"]
    fields = form["body"]
    assert {field["type"] for field in fields} <= {"markdown", "input", "textarea", "dropdown"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations") == {"required": "true"} for field in fields)


def test_there_is_a_form_for_each_kind_of_report() -> None:
    assert {path.stem for path in TEMPLATES} == {"bug", "config", "feature", "numerical-difference"}
