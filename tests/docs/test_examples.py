"""The scripts in examples/ run as their first lines say, and print what they promise."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import upstream
from fresh_process import run_python
from page_blocks import DOCS, ROOT
from PIL import Image

import himo
from himo.model import CONFIGS

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the source tree")


def example(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Returns what a script prints, run in this process, which has imported torch."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def test_two_towers_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    steps = re.findall(
        r"contrastive (\S+), component (\S+), rank (\d+)", example("train_towers", capsys)
    )
    first, *_, last = [[float(value) for value in step] for step in steps]
    assert last[0] < 0.5 * first[0] and last[1] < 0.5 * first[1]


def test_the_rank_grows_with_tau_and_shrinks_with_repetition(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = example("what_hide_keeps", capsys).splitlines()[1:]
    ranks = {line[:20].strip(): [int(rank) for rank in line[20:].split()] for line in lines}
    assert all(row == sorted(row) for row in ranks.values())
    assert (
        ranks["ten class names"][-1] <= 9 < ranks["a few topics"][1] < ranks["unrelated texts"][1]
    )


def test_open_clips_loss_is_accelerated(capsys: pytest.CaptureFixture[str]) -> None:
    if upstream.open_clip_loss() is None:
        pytest.skip("open_clip is not installed")
    said = example("accelerate_open_clip", capsys)
    assert said.count("differs by at most") == 4 and "after undo()" in said


@pytest.mark.slow  # three processes import torch
def test_ranks_have_the_gradient_of_one_process() -> None:
    said = run_python(
        *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
        str(EXAMPLES / "ranks.py"),
        OMP_NUM_THREADS="1",
    )
    assert said == "2 ranks of 12 pairs have the gradient of 24 pairs"


def test_captions_are_ranked_by_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture = tmp_path / "model.safetensors", tmp_path / "red.png"
    himo.save(himo.HiMoCLIP(CONFIGS["tiny"]), model)
    Image.new("RGB", (90, 70), "red").save(picture)
    captions = ["A red kite.", "A cat sleeps."]
    monkeypatch.setattr(
        sys, "argv", ["rank_captions.py", str(model), str(picture), "--captions", *captions]
    )
    said = example("rank_captions", capsys).strip()
    found = re.fullmatch(rf"{re.escape(str(picture))}: (\S+)% (.*)", said)
    assert found and 50 <= float(found[1]) <= 100 and found[2] in captions


def test_the_quick_start_lists_every_script() -> None:
    page = (DOCS / "index.md").read_text()
    assert set(re.findall(r"`examples/(\w+)\.py`", page)) == {p.stem for p in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_says_how_it_is_run(path: Path) -> None:
    assert f"examples/{path.name}" in path.read_text().split('"""')[1]
