"""himo context: what HiDe keeps of a caption, against plain numpy, and bad input as one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import report_runs
import torch

from himo.checkpoint import save
from himo.cli import main
from himo.model import CONFIGS, HiMoCLIP
from himo.report.context import kept_in

CAPTION = "A picture of <b>four</b> shapes. A red circle is on the left. A blue square is small."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.safetensors and two data sets of 12 and 8 different captions."""
    folder = tmp_path_factory.mktemp("context")
    torch.manual_seed(0)
    save(HiMoCLIP(CONFIGS["tiny"]), folder / "model.safetensors")
    for name, seeds in (("many.json", range(12)), ("few.json", range(20, 28))):
        records = []
        for seed in seeds:
            (folder / f"{seed}.jpg").write_bytes(b"not read")
            caption = " ".join(report_runs.scene(seed)[1])
            records.append({"image": f"{seed}.jpg", "caption": caption})
        (folder / name).write_text(json.dumps(records))
    return folder


def arguments(files: Path, out: Path, *data: str) -> list[str]:
    sets = [part for name in data for part in ("--data", str(files / name))]
    model = ["--pretrained", str(files / "model.safetensors"), "--out", str(out)]
    return ["context", CAPTION, *sets, *model]


def test_kept_shares_equal_those_of_a_plain_svd() -> None:
    batch = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    added = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    added[2] = 0
    found = kept_in("batch", ["a caption"] * 8, batch, added, 0.7)
    x = batch.numpy()
    mean = x.mean(axis=0)
    _, singular, axes = np.linalg.svd(x - mean)
    ratios = singular**2 / (singular**2).sum()
    rank = int(np.searchsorted(ratios.cumsum(), 0.7) + 1)
    basis = axes[:rank]
    component = mean + (x[0] - mean) @ basis.T @ basis
    assert found.rank == rank and 1 <= rank < 6
    np.testing.assert_allclose(found.ratios, ratios, atol=1e-12)
    np.testing.assert_allclose(found.component.numpy(), component, atol=1e-12)
    distance = np.linalg.norm(x[0] - mean) ** 2
    assert found.share == pytest.approx(np.linalg.norm(component - mean) ** 2 / distance, abs=1e-12)
    for row, share in zip(added.numpy()[:2], found.added[:2], strict=True):
        kept = np.linalg.norm(row @ basis.T) ** 2 / np.linalg.norm(row) ** 2
        assert share == pytest.approx(kept, abs=1e-12)
    assert found.added[2] is None


def test_everything_is_kept_of_equal_captions() -> None:
    same = torch.ones(4, 5, dtype=torch.float64)
    assert kept_in("batch", [], same, torch.zeros(2, 5, dtype=torch.float64), 0.9).share == 1


def test_one_data_set_gives_a_random_batch_and_one_alike(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    given = arguments(files, out, "many.json")
    figures = ["--figures", str(tmp_path / "figures")]
    assert main([*given, "--batch-size", "6", "--tau", "0.6", *figures]) == 0
    printed, page = capsys.readouterr().out, out.read_text(encoding="utf-8")
    shares = [float(share) for share in re.findall(r"(\d+\.\d) %", printed)]
    assert len(shares) == 8 and all(0 <= share <= 100 for share in shares)  # caption, 3 segments
    assert [line.split()[0] for line in printed.splitlines()[3:6]] == ["1", "2", "3"]
    assert "&lt;b&gt;four&lt;/b&gt;" in page and "<b>four" not in page
    for share in shares:
        assert f"{share:.1f} %" in page
    assert page.count('<ul class="others">') == 2 and page.count("most like the caption") > 1
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"kept.svg", "spectrum.svg"}


def test_the_same_call_writes_the_same_numbers(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(files, tmp_path / "page.html", "many.json", "few.json")
    printed = []
    for seed in ("0", "0", "1"):
        assert main([*given, "--batch-size", "5", "--seed", seed]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert "many.json" in printed[0] and "few.json" in printed[0]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Among captions of <b>many.json</b>" in page and "those of <b>few.json</b>" in page


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "2"], "--batch-size: expected at least 3, got 2"),
        (["--batch-size", "14"], "--batch-size: expected at most 13, the different captions"),
        (["--tau", "0"], "--tau: expected a number in (0, 1], got 0.0"),
        (["--tau", "nan"], "--tau: expected a number in (0, 1], got nan"),
        (["--data", "none.json"], "none.json"),
        (["--data", "x.json", "--data", "y.json"], "--data: expected one or two data sets, got 3"),
        (["--out", "page.svg"], "expected a name that ends in .html"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    more: list[str],
    said: str,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments(files, tmp_path / "page.html", "many.json"), *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_caption_of_one_sentence_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(files, tmp_path / "page.html", "many.json")
    assert main([given[0], "One sentence.", *given[2:]]) == 2
    assert "caption: expected at least two sentences" in capsys.readouterr().err
