"""The choices of a recipe for flags that a user leaves open, and the notes on a schedule."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from train_runs import lines, photos, refused, small_model

import himo
from himo import recipes
from himo.cli import main
from himo.config import TrainConfig
from himo.errors import HimoError
from himo.memory import free_memory, out_of_memory_advice, step_bytes
from himo.model import CONFIGS
from himo.tools.footprint import Rehearsal

GIB = 1 << 30


def resolved(pairs: int | None, *, free: int = 0, processes: int = 1, **given) -> TrainConfig:
    settings = recipes.with_model(TrainConfig(train_data="x", **given), pairs)
    config = CONFIGS[settings.model or "ViT-B-16"]
    return recipes.with_schedule(settings, pairs, processes=processes, config=config, free=free)


def values(settings: TrainConfig) -> tuple:
    names = ("model", "batch_size", "accum_freq", "epochs", "lr", "wd", "warmup")
    return tuple(getattr(settings, name) for name in names)


@pytest.mark.parametrize(
    ("pairs", "given", "expected"),
    [
        (300, {}, ("tiny", 32, 1, 30, 1e-3, 0.1, 27)),
        (24, {}, ("tiny", 8, 1, 30, 1e-3, 0.1, 9)),
        (5, {}, ("tiny", 4, 1, 30, 1e-3, 0.1, 3)),
        (2_000_000, {}, ("ViT-B-32", 128, 1, 30, 1e-3, 0.1, 10_000)),
        (20_000_000, {}, ("ViT-B-16", 128, 1, 30, 1e-3, 0.1, 10_000)),
        (None, {}, ("ViT-B-32", 128, 1, 30, 1e-3, 0.1, 10_000)),
        (300, {"recipe": "from-scratch"}, ("tiny", 32, 1, 30, 1e-3, 0.1, 27)),
        (300, {"pretrained": "x"}, (None, 32, 1, 10, 1e-5, 1e-2, 9)),
        (1_200_000, {"pretrained": "x"}, (None, 128, 1, 10, 1e-6, 1e-2, 200)),
        (300, {"recipe": "paper-b16"}, ("ViT-B-16", 128, 1, 10, 1e-6, 1e-2, 200)),
        (300, {"recipe": "paper-l14"}, ("ViT-L-14", 128, 1, 10, 1e-6, 1e-2, 200)),
        (300, {"lr": 1e-4, "warmup": 0}, ("tiny", 32, 1, 30, 1e-4, 0.1, 0)),
        (300, {"batch_size": 10, "epochs": 2}, ("tiny", 10, 1, 2, 1e-3, 0.1, 6)),
        (300, {"accum_freq": 4}, ("tiny", 8, 4, 30, 1e-3, 0.1, 27)),
        (300, {"model": "ViT-B-32", "wd": 0.0}, ("ViT-B-32", 32, 1, 30, 1e-3, 0.0, 27)),
    ],
    ids=str,
)
def test_choices_depend_on_pairs_and_checkpoint_and_flags_win(pairs, given, expected):
    assert values(resolved(pairs, **given)) == expected


def test_too_little_memory_splits_a_step_and_keeps_its_pairs():
    for free, batch in ((8, 16), (16, 32), (80, 128)):
        settings = resolved(10**6, recipe="paper-b16", pretrained="x", free=free * GIB)
        assert settings.batch_size == batch and settings.accum_freq == 128 // batch
        assert step_bytes(CONFIGS["ViT-B-16"], settings, batch) < free * GIB
    assert resolved(10**6, recipe="paper-b16", free=1).batch_size == 2


def test_processes_share_the_pairs():
    settings = resolved(300, processes=4)
    assert settings.batch_size == 8 and settings.warmup == 300 // (8 * 4) * 30 // 10


def test_sharing_out_the_weights_leaves_memory_for_pairs():
    def batch(**given) -> int:
        return resolved(10**6, recipe="paper-l14", free=14 * GIB, **given).batch_size

    assert batch(processes=8, fsdp=True) > batch(processes=8)
    assert batch(processes=1) >= batch(processes=8)  # without DDP's buckets


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("model", "processes", "fsdp"),
    [("tiny", 1, False), ("tiny", 8, False), ("tiny", 8, True), ("ViT-B-32", 1, False)],
)
def test_the_memory_of_a_step_is_near_the_counted_one(model, processes, fsdp, checkpointing):
    settings = resolved(
        None, model=model, processes=processes, fsdp=fsdp, grad_checkpointing=checkpointing
    )
    counted = Rehearsal(settings, processes).step(batch_size=128).total
    estimate = step_bytes(CONFIGS[model], settings, 128, processes)
    assert 0.9 < estimate / counted < (1.2 if checkpointing else 1.1)


def test_free_memory_of_a_machine_is_shared_by_its_processes(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_memory(cpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert 0 < free_memory(cpu) < alone / 100


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60)])
def test_out_of_memory_names_the_flags(allocate):
    message = "--batch-size .* --grad-checkpointing.* `himo plan`"
    with pytest.raises(HimoError, match=message), out_of_memory_advice():
        allocate()


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes cannot"), out_of_memory_advice():
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize(
    ("pairs", "given", "said"),
    [
        (300, {"warmup": 270}, "--warmup 270 takes longer than the 270 steps of this run"),
        (300, {"epochs": 5}, "45 steps are few: more --epochs or a smaller --batch-size"),
        (300, {"lr": 1e-6}, "--lr 1e-06 is for a trained model, .* --recipe from-scratch takes"),
        (300, {"lr": 1e-3, "pretrained": "x"}, "--lr 0.001 is for a new model"),
        (300, {"lr": 0.0}, "--lr 0 changes no weight"),
    ],
    ids=str,
)
def test_a_schedule_that_hardly_trains_is_doubted(pairs, given, said):
    settings = resolved(pairs, **given)
    (doubt,) = recipes.doubts(settings, recipes.total_steps(settings, pairs))
    with pytest.raises(HimoError, match=said):
        raise HimoError(doubt)
    assert recipes.doubts(resolved(pairs), 270) == []


def test_a_recipe_for_new_models_takes_no_checkpoint(tmp_path, capsys):
    pairs, small = photos(tmp_path), small_model(tmp_path)
    message = refused(capsys, pairs, tmp_path, *small, "--recipe", "from-scratch")
    assert "--recipe from-scratch: expected no --pretrained" in message


@pytest.fixture(scope="module")
def open_run(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(csv, logs, flags) of a run whose schedule is open, with a state after each step."""
    folder = tmp_path_factory.mktemp("open")
    flags = ["--train-data", str(photos(folder)), *small_model(folder), "--logs", str(folder)]
    flags += ["--name", "run", "--workers", "0", "--log-every-n-steps", "1", "--epochs", "1"]
    assert main(["train", *flags, "--save-every-n-steps", "1", "--keep-checkpoints", "0"]) == 0
    return folder / "pairs.csv", folder, flags


def test_what_was_chosen_is_recorded_and_reported(open_run, tmp_path):
    _, logs, _ = open_run
    chosen = {"batch_size": 8, "lr": 1e-5, "wd": 0.01, "warmup": 0}
    config = json.loads((logs / "run/config.json").read_text())
    assert config["chosen"] == chosen and config["recipe"] == "auto" and config["name"] == "run"
    assert {name: config[name] for name in chosen} == chosen
    first, *others = lines(logs)
    assert first["recipe"] == {"auto": chosen} and not any("recipe" in row for row in others)
    assert main(["report", str(logs / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert "&#34;batch_size&#34;: 8" in (tmp_path / "report.html").read_text()


def test_a_recipe_is_the_flags_that_it_prints(open_run, tmp_path, capsys):
    flags = [*open_run[2], "--logs", str(tmp_path)]
    assert main(["train", *flags]) == 0
    output = capsys.readouterr()
    (printed,) = (row for row in output.out.splitlines() if "recipe auto: " in row)
    assert "left out" not in output.err
    explicit = printed.partition("recipe auto: ")[2].split()
    assert main(["train", *flags, "--name", "explicit", *explicit]) == 0
    assert "recipe auto" not in capsys.readouterr().out
    models = [tmp_path / name / "checkpoints/epoch_1.safetensors" for name in ("run", "explicit")]
    for one, other in zip(*(himo.load(path)[0].parameters() for path in models), strict=True):
        assert torch.equal(one, other)


def test_a_resumed_run_keeps_the_choices_of_its_start(open_run, capsys):
    _, logs, flags = open_run
    again = [*flags, "--resume", str(logs / "run/checkpoints/state-00000002.safetensors")]
    before = lines(logs)
    assert main(["train", *again]) == 0
    assert [row["lr"] for row in lines(logs)] == [row["lr"] for row in before]
    assert json.loads((logs / "run/config.json").read_text())["chosen"]["batch_size"] == 8
    capsys.readouterr()
    assert main(["train", *again, "--recipe", "paper-b16"]) == 2
    assert "expected --recipe auto as it began, got paper-b16" in capsys.readouterr().err


def test_pairs_left_out_of_an_epoch_are_said(open_run, tmp_path, capsys):
    _, _, flags = open_run
    flags = [*flags, "--logs", str(tmp_path), "--batch-size", "10"]
    assert main(["train", *flags]) == 0
    assert "4 of 24 pairs are left out of an epoch, others each time" in capsys.readouterr().err
    assert main(["train", *flags, "--name", "all", "--keep-last-batch"]) == 0
    assert "left out" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_new_model_learns_from_300_scenes(tmp_path, capsys):
    data = tmp_path / "data"
    assert main(["synth", "--out", str(data), "--num", "300", "--held-out", "500"]) == 0
    flags = ["--train-data", str(data / "train.json"), "--val-data", str(data / "test.json")]
    assert main(["train", *flags, "--val-frequency", "10", "--logs", str(tmp_path)]) == 0
    metrics = (tmp_path / "auto-himo-0/metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, metrics) if "val_text_to_image_R@1" in row]
    chance = 100 / 500
    for way in ("image_to_text", "text_to_image"):
        found = [row[f"val_{way}_R@1"] for row in rows]
        assert found[-1] >= 10 * chance, found
    assert all(a["step"] < b["step"] for a, b in pairwise(rows))
