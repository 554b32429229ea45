"""Every Python and shell block of the pages in docs/ runs, in the order of its page."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import upstream
from page_blocks import DOCS, ROOT, Block, blocks_of

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the source tree")

SECONDS = (
    1200  # of a page: fine-tune.md trains and starts eight commands, on a machine that is busy
)
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def until_shell(blocks: list[Block]) -> list[Block]:
    """Returns the blocks before the first shell command, which `make test` runs.

    Most commands import torch anew, which takes seconds.
    """
    shell = (i for i, block in enumerate(blocks) if block.language == "bash" and not block.reason)
    return blocks[: next(shell, len(blocks))]


def runs() -> list[Any]:
    """Returns the parameters (page, all of it): a slow one for each page with shell commands."""
    found = []
    for name in PAGES:
        blocks = blocks_of((DOCS / name).read_text())
        quick = until_shell(blocks)
        if any(block.reason is None for block in quick):
            found.append(pytest.param(name, False, id=name))
        if len(quick) < len(blocks):
            marks = [pytest.mark.slow, pytest.mark.timeout(SECONDS)]
            found.append(pytest.param(name, True, id=f"{name}-whole", marks=marks))
    return found


def commands(folder: Path) -> dict[str, str]:
    """Returns an environment in which `himo` and `python` are those of this tree."""
    programs = folder / "programs"
    programs.mkdir()
    for name, arguments in (("himo", "-m himo "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    programs_first = os.pathsep.join([str(programs), os.environ["PATH"]])
    return {**os.environ, "PATH": programs_first, "PYTHONPATH": path}


def test_torchrun_starts_himo_behind_two_dashes() -> None:
    # Without them torchrun parses flags of himo, such as --logs, itself.
    texts = [path for pattern in ("*.md", "*.py") for path in ROOT.glob(f"himo*/**/{pattern}")]
    texts += [ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.py")]
    starts = [
        line
        for path in texts
        for line in path.read_text().splitlines()
        if "torchrun -" in line and "himo train" in line
    ]
    assert len(starts) >= 5
    assert [line for line in starts if " -m -- himo train" not in line] == []


def run(block: Block, names: dict[str, Any], environment: dict[str, str]) -> None:
    if block.language == "python":
        exec(compile(block.code, "<block>", "exec"), names)
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize(("name", "whole"), runs())
def test_every_block_of_a_page_runs(
    name: str,
    whole: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    blocks = blocks_of((DOCS / name).read_text())
    blocks = blocks if whole else until_shell(blocks)
    if any("from open_clip" in b.code for b in blocks) and upstream.open_clip_loss() is None:
        pytest.skip("open_clip is not installed")
    environment = commands(tmp_path)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(generator.initial_seed())
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.reason is None:
            run(block, names, environment)


def test_the_pages_have_blocks_of_both_languages_that_run() -> None:
    blocks = [b for name in PAGES for b in blocks_of((DOCS / name).read_text())]
    assert {b.language for b in blocks if b.reason is None} == {"python", "bash"}


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```python\n1 / 0\n```", [("python", None)]),
        ("<!-- not run: needs a GPU -->\n```bash\nmake gpu\n```", [("bash", "needs a GPU")]),
        ("```text\nshown\n```\n\n```bash\ntrue\n```", [("bash", None)]),
        (
            "<!-- not run: a network -->\n<!-- include: README.md#Install -->",
            [("bash", "a network")] * 2,
        ),
        ("<!-- include: README.md#Install -->", [("bash", None)] * 2),
    ],
    ids=["plain", "marked", "shown", "marked-include", "include"],
)
def test_blocks_are_found_with_their_marks(page: str, expected: list[tuple[str, Any]]) -> None:
    assert [(b.language, b.reason) for b in blocks_of(page)] == expected


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nls\n```",  # would not be run
        "```\nls\n```",
        "- an item\n  ```bash\n  ls\n  ```",
        "~~~bash\nls\n~~~",
        "<!-- not run: -->\n```bash\nls\n```",
        "<!-- not run: words between -->\n\nHere:\n```bash\nls\n```",
        "<!-- include: README.md#No such heading -->",
        "<!-- include: nowhere.md -->",
    ],
)
def test_a_block_or_mark_that_would_be_overlooked_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        blocks_of(page)


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit(1)"])
def test_a_python_block_that_fails_fails_its_page(code: str) -> None:
    with pytest.raises((ZeroDivisionError, SystemExit)):
        run(Block("python", code, None), {}, {})


@pytest.mark.parametrize("code", ["false\ntrue", "false | true", "echo $NOT_SET"])
def test_a_shell_block_of_which_a_line_fails_fails_its_page(code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run(Block("bash", code, None), {}, commands(tmp_path))
