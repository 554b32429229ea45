"""Validation during training: its line, the best model, --patience, and --report-to."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from train_runs import lines, photos, refused, small_model, train, train_here

import himo
from himo import run_folder
from himo.cli import main
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.reporting import check_installed
from himo.transforms import open_image
from himo.validation import Best

WAYS = ("image_to_text", "text_to_image")


def recalls(value: float) -> dict[str, float]:
    return {f"val_{way}_R@1": value for way in WAYS}


def test_best_counts_the_validations_after_it():
    best = Best()
    beaten = [best.is_beaten(step, step / 2, recalls(r)) for step, r in enumerate((0, 0, 5, 5), 1)]
    assert beaten == [True, False, True, False] and best == Best(3, 1.5, 5.0, 1)
    assert best.description() == "best after epoch 1.5, R@1 5.0 %"


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(csv, logs, flags) of a run of 4 epochs with a validation after each."""
    folder = tmp_path_factory.mktemp("begun")
    pairs = photos(folder)
    # With 6 pairs the second epoch is the best, on this processor at least.
    flags = [*small_model(folder), "--epochs", "4", "--held-out", "6"]
    assert train_here(pairs, folder / "logs", *flags, "--keep-checkpoints", "0") == 0
    return pairs, folder / "logs", flags


@pytest.fixture
def run(begun, tmp_path) -> tuple[Path, Path, list[str]]:
    pairs, logs, flags = begun
    shutil.copytree(logs, tmp_path / "logs")
    return pairs, tmp_path / "logs", flags


def score(row: dict) -> float:
    return sum(row[f"val_{way}_R@1"] for way in WAYS) / 2


def best_step(logs: Path) -> int:
    model, _ = himo.load(logs / "run/checkpoints/best.safetensors")
    return model.provenance["training"]["step"]


def test_the_best_model_is_kept_and_a_line_told(begun, tmp_path, capsys):
    pairs, _, flags = begun
    assert train_here(pairs, tmp_path, *flags, "--keep-checkpoints", "1", "--val-himo") == 0
    output = capsys.readouterr().out
    rows = [row for row in lines(tmp_path) if "val_text_to_image_R@1" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    best = max(rows, key=score)
    assert best_step(tmp_path) == best["step"]
    for epoch, row in enumerate(rows, 1):
        ways = (f"{row[f'val_{way}_R@1']:.1f} % {way.replace('_', ' ')}" for way in WAYS)
        at_k = (f"HiMo@{k} {row[f'val_HiMo@{k}']:.1f} %" for k in (2, 3))
        assert f"epoch {epoch}: R@1 {', '.join(ways)} (chance 17 %), {', '.join(at_k)}" in output
    assert output.count("the best so far") >= 1
    epoch = best["step"] / 2
    assert f"best after epoch {epoch:g}, R@1 {score(best):.1f} %, " in output
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["best.safetensors", "epoch_4.safetensors", "state-00000008.safetensors"]


def test_himo_of_a_validation_is_what_himo_eval_finds(begun, tmp_path):
    pairs, _, flags = begun
    flags = [*flags[:-2], "--epochs", "1", "--val-data", str(pairs), "--val-himo"]
    assert train_here(pairs, tmp_path, *flags) == 0
    checkpoint, out = tmp_path / "run/checkpoints/epoch_1.safetensors", tmp_path / "eval.json"
    arguments = ["eval", "--pretrained", checkpoint, "--data", pairs, "--out", out]
    assert main(list(map(str, arguments))) == 0
    found = json.loads(out.read_text())["himo"]
    for k in (2, 3):
        assert lines(tmp_path)[-1][f"val_HiMo@{k}"] == found[f"HiMo@{k}"]["value"]


def test_a_few_predictions_are_followed_from_epoch_to_epoch(begun):
    pairs, logs, _ = begun
    with pairs.open(newline="") as file:
        held_out = list(csv.DictReader(file))[:6]
    captions = [row["title"] for row in held_out]
    rows = [row for row in lines(logs) if "predictions" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for epoch, row in enumerate(rows, 1):
        model, preprocess = himo.load(logs / f"run/checkpoints/epoch_{epoch}.safetensors")
        images = [preprocess(open_image(pairs.parent / pair["filepath"])) for pair in held_out[:4]]
        with torch.no_grad():
            image_features = model.encode_image(torch.stack(images), normalize=True)
            length = model.config.context_length
            texts = himo.tokenize(captions, context_length=length)
            scores = image_features @ model.encode_text(texts, normalize=True).T
        for number, found in enumerate(row["predictions"]):
            above = int((scores[number] > scores[number, number]).sum())
            assert found == {
                "image": held_out[number]["filepath"],
                "caption": captions[number],
                "rank": 1 + above,
                "best": captions[int(scores[number].argmax())],
            }
        assert len(row["predictions"]) == 4


def test_old_models_go_with_old_states(tmp_path):
    for name in ("epoch_2", "epoch_10", "epoch_9", "epoch_11", "epoch_x", "best"):
        (tmp_path / f"{name}.safetensors").touch()
    found = [path.stem for path in run_folder.saved_models(tmp_path, 10)]
    assert found == ["epoch_2", "epoch_9", "epoch_10"]  # epoch 11 is of another way


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_step(begun, tmp_path, capsys):
    pairs, _, flags = begun
    still = [*flags, "--lr", "0", "--patience", "1"]  # no validation is better than the first
    assert train_here(pairs, tmp_path, *still, "--save-every-n-steps", "1") == 0
    output = capsys.readouterr().out
    assert "no better R@1 in 1 validations, --patience 1: the run ends" in output
    assert "done" in output and "epoch_2.safetensors" in output
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4] and best_step(tmp_path) == 2
    for state in ("3", "4"):  # one step before the last validation, and after it
        path = tmp_path / f"run/checkpoints/state-0000000{state}.safetensors"
        assert train_here(pairs, tmp_path, *still, "--resume", str(path)) == 0
        assert "--patience 1: the run ends" in capsys.readouterr().out
        assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
        assert best_step(tmp_path) == 2
    assert train_here(pairs, tmp_path, *still[:-2], "--patience", "9", "--resume", "latest") == 0
    assert lines(tmp_path)[-1]["step"] == 8


def weights(path: Path) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in himo.load(path)[0].state_dict().values()]


@pytest.mark.slow
def test_the_best_model_survives_a_resume(run):
    pairs, logs, flags = run
    best = logs / "run/checkpoints/best.safetensors"
    before, content = [score(row) for row in lines(logs) if row["step"] % 2 == 0], weights(best)
    for step in (2, 4, 6, 8):
        state = logs / f"run/checkpoints/state-0000000{step}.safetensors"
        resumed = [*flags, "--keep-checkpoints", "0", "--resume", str(state)]
        assert train_here(pairs, logs, *resumed) == 0
        assert [score(row) for row in lines(logs) if row["step"] % 2 == 0] == before
        assert weights(best) == content


def test_a_best_model_of_another_way_is_set_aside(run, capsys):
    checkpoints = run[1] / "run/checkpoints"
    (checkpoints / "best.safetensors").unlink()
    shutil.copy(checkpoints / "epoch_3.safetensors", checkpoints / "best.safetensors")
    folder = run[1] / "run"
    assert run_folder.keeps_best(folder, 6)
    assert not run_folder.keeps_best(folder, 4)
    said = "best.safetensors.set-aside: of another step than the best of this run, 4"
    assert said in capsys.readouterr().err
    assert (checkpoints / "best.safetensors.set-aside").exists()
    assert not run_folder.keeps_best(folder, 6)  # there is none now


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--patience", "2"], "--patience: expected a validation, from --val-data or --held-out"),
        (["--val-himo"], "--val-himo: expected a validation, from --val-data or --held-out"),
        (["--report-to", "wand"], "--report-to: expected tensorboard or wandb, got 'wand'"),
        (["--recipe", "paper-b16", "--patience", "-1"], "--patience: expected at least 0, got -1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_are_named(begun, tmp_path, capsys, flags, said):
    assert said in refused(capsys, begun[0], tmp_path, *flags)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_absent_package_is_named(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = TrainConfig(train_data="x", report_to=name)
    with pytest.raises(HimoError, match=f"--report-to {name}: is not installed: pip install"):
        check_installed(settings)


def test_tensorboard_gets_the_lines(begun, tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module)
    pairs, _, flags = begun
    assert train_here(pairs, tmp_path, *flags, "--report-to", "tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "val_text_to_image_R@1"):
        rows = [row for row in lines(tmp_path) if name in row]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [row["step"] for row in rows]
        expected = torch.tensor([row[name] for row in rows])  # TensorBoard stores float32
        assert torch.equal(torch.tensor([value for _, value in found]), expected)


def test_wandb_gets_the_lines_without_a_network(begun, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    pairs, _, flags = begun
    assert train_here(pairs, tmp_path, *flags, "--report-to", "wandb") == 0
    (record,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert b"val_text_to_image_R@1" in record.read_bytes()


def test_wandb_without_an_account_is_one_line(begun, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    pairs, _, flags = begun
    flags = [*flags, "--report-to", "tensorboard,wandb"]
    # In a process of its own: W&B reads its settings once.
    said = train(pairs, tmp_path, *flags, status=2).stderr.strip().splitlines()[-1]
    assert said.startswith("himo: error: --report-to wandb: No API key configured")
    assert said.endswith("; WANDB_MODE=offline writes to the run's folder")
    # The same command begins the run once W&B can.
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train_here(pairs, tmp_path, *flags) == 0
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
