"""Named sets against the numbers that the released evaluation scripts print for the same model.

HIMO_CLIP names a checkout of https://github.com/UnicomAI/HiMo-CLIP, whose code is not here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluate_cases import write_checkpoint
from named_sets import SIZE, write_all

from himo.cli import main

RELEASED = os.environ.get("HIMO_CLIP")
DRIVER = Path(__file__).with_name("released_script.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(RELEASED is None, reason="HIMO_CLIP does not name a checkout of HiMo-CLIP"),
]
SCRIPTS = {
    "urban1k": ("eval/retrieval/Urban1k.py", (1,)),
    "docci": ("eval/retrieval/docci.py", (1,)),
    "long-dci": ("eval/retrieval/dci_long.py", (1, 5, 10)),
    "flickr30k": ("eval/retrieval/flickr30k.py", (1, 5, 10)),
    "coco": ("eval/retrieval/coco.py", (1, 5, 10)),
}
SHARE = re.compile(r"^(?:.* )?([01]\.\d+(?:e-\d+)?)$", re.MULTILINE)  # ends a line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `data`, as the scripts expect it, and a model."""
    root = tmp_path_factory.mktemp("released")
    write_all(root / "data")
    docci = root / "data" / "docci"
    lines = (docci / "docci_descriptions.jsonlines").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["split"] == "test"]
    (docci / "test_set.jsonl").write_text("".join(kept))
    shutil.copy(docci / "himo_docci_data.json", root)
    write_checkpoint(root / "tiny.safetensors")
    return root


@pytest.fixture(scope="module")
def sets(folder):
    given = ["--pretrained", folder / "tiny.safetensors", "--data-root", folder / "data"]
    given += ["--suite", "paper", "--device", "cpu", "--out", folder / "eval.json"]
    assert main(["eval", *map(str, given)]) == 0
    return json.loads((folder / "eval.json").read_text())["models"][0]["sets"]


def printed(folder, script):
    """What a script prints in `folder`."""
    given = [str(Path(RELEASED) / script), str(folder / "tiny.safetensors"), str(SIZE)]
    command = [sys.executable, str(DRIVER), *given]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_recalls_are_those_of_the_released_script(name, folder, sets):
    script, ks = SCRIPTS[name]
    shares = [float(share) for share in SHARE.findall(printed(folder, script))]
    ways = ("image_to_text", "text_to_image")
    found = [sets[name]["retrieval"][way][f"R@{k}"] for way in ways for k in ks]
    assert found == pytest.approx([100 * share for share in shares])
    assert min(found) < 100


def test_himo_k_is_that_of_the_released_script(folder, sets):
    text = printed(folder, "eval/text_mono/get_himo.py")
    (value,) = re.findall(r"^HiMo@K average Pearson: (-?[\d.]+)$", text, re.MULTILINE)
    assert sets["himo-docci"]["measures"]["HiMo@K"]["value"] == pytest.approx(
        float(value), abs=1e-4
    )
