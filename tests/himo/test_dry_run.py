"""`himo train --dry-run`: everything a run needs is tried, and nothing is written."""

import re
from pathlib import Path

import pytest
from train_runs import lines, photos, refused, small_model, train_here


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, list[str]]:
    """(csv, flags) of 24 pairs and a model of 0.8 million parameters."""
    folder = tmp_path_factory.mktemp("photos")
    return photos(folder), small_model(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_prints_the_plan_and_writes_nothing(begun, tmp_path, capsys):
    pairs, small = begun
    flags = [*small, "--ema", "0.9", "--layer-decay", "0.5", "--held-out", "8"]
    assert train_here(pairs, tmp_path / "warm", *flags) == 0  # the index of the data is there
    before = files(pairs.parent)
    capsys.readouterr()
    assert train_here(pairs, tmp_path / "logs", *flags, "--dry-run") == 0
    output = capsys.readouterr().out
    assert not (tmp_path / "logs").exists() and files(pairs.parent) == before
    assert "himo loss, trains 0.8 M of 0.8 M parameters on cpu" in output
    assert "16 pairs, 4 steps of 8, himo loss" in output and "8 pairs to validate on" in output
    assert "run: recipe auto: --wd 0.01" in output
    assert output.count("dry run, nothing is written there") == 1
    assert "M parameters in fp32, at 0.25 to 1 of the rate, with an average of decay 0.9" in output
    assert "0.001 after 2 steps of warm-up, then a cosine to 0 at step 4" in output
    first = lines(tmp_path / "warm")[0]
    found = re.search(r"first step  loss (.*), gradient norm (.*), HiDe keeps R = (\d+)", output)
    assert found[1] == f"{first['loss']:.4g}" and found[2] == f"{first['grad_norm']:.3g}"
    assert int(found[3]) == first["rank"]
    assert re.search(r"(?m)^  time +[\d.]+ s a step, [\d.]+ s for its pairs", output)
    assert 0.1 < float(re.search(r"memory +([\d.]+) GiB of the process", output)[1]) < 50


def test_a_dry_run_of_a_resumed_run_changes_none_of_its_files(begun, tmp_path, capsys):
    pairs, small = begun
    flags = [*small, "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, tmp_path, *flags) == 0
    before = files(tmp_path)
    state = tmp_path / "run/checkpoints/state-00000002.safetensors"
    assert train_here(pairs, tmp_path, *flags, "--resume", str(state), "--dry-run") == 0
    assert "goes on after step 2" in capsys.readouterr().out and files(tmp_path) == before
    # A new run of this name would be refused; a dry run writes nothing there, and says so.
    assert train_here(pairs, tmp_path, *flags, "--dry-run") == 0
    printed = capsys.readouterr()
    assert f"himo: note: {tmp_path / 'run'}: already holds a run: continue it" in printed.err
    assert "dry run, nothing is written there" in printed.out and files(tmp_path) == before
    # What else a run would refuse, it refuses too.
    resumed = ["--resume", str(state), "--lr", "5", "--dry-run"]
    assert "--lr 0.001 as it began" in refused(capsys, pairs, tmp_path, *flags, *resumed)
    assert files(tmp_path) == before


def test_a_dry_run_from_the_end_of_an_epoch_goes_on_with_the_next(begun, tmp_path, capsys):
    pairs, small = begun
    assert train_here(pairs, tmp_path, *small) == 0
    before = files(tmp_path)
    flags = [*small, "--resume", "latest", "--dry-run"]
    assert train_here(pairs, tmp_path, *flags) == 0
    assert "dry run, no step is left after step 6" in capsys.readouterr().out
    more = ["--epochs", "3", "--allow-changes", "epochs"]
    assert train_here(pairs, tmp_path, *flags, *more) == 0
    output = capsys.readouterr().out
    assert "goes on after step 6" in output and re.search(r"first step  loss [\d.]+, grad", output)
    assert files(tmp_path) == before


def test_a_dry_run_finds_what_a_run_would_end_on(begun, tmp_path, capsys):
    pairs, small = begun
    message = refused(capsys, pairs, tmp_path, *small, "--dry-run", "--warmup", "9")
    assert "--warmup: expected less than the 6 steps" in message
    (tmp_path / "file").write_text("")
    logs = ["--logs", str(tmp_path / "file")]
    message = refused(capsys, pairs, tmp_path, *small, "--dry-run", *logs)
    assert f"cannot be written: {tmp_path / 'file'} is no folder" in message
    flags = [*small, "--dry-run", "--lr", "1e30", "--warmup", "0"]
    assert train_here(pairs, tmp_path, *flags) == 2
    assert re.search(r"step 2: the loss is (nan|inf)", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
