"""--config: flags from a file, which those of the command line overrule."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest

from himo import config, run_folder
from himo.config import TrainConfig
from himo.errors import HimoError


def settings(*given: object) -> TrainConfig:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.from_arguments(parser.parse_args([str(argument) for argument in given]))


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_gives_flags_and_the_command_line_wins(tmp_path: Path) -> None:
    toml = written(
        tmp_path / "run.toml",
        'train-data = "pairs.csv"\nlr = 1e-4\nbatch_size = 32\nlock-image = true\nepochs = 2\n'
        "wd = 1\n",
    )
    expected = TrainConfig("pairs.csv", lr=1e-4, batch_size=32, lock_image=True, epochs=2, wd=1.0)
    assert settings("--config", toml) == expected
    assert type(settings("--config", toml).wd) is float
    # Wherever --config comes, and also a flag that is given its default.
    flags = ("--lr", "1e-6", "--no-lock-image", "--epochs", 3)
    overruled = dataclasses.replace(expected, lr=1e-6, lock_image=False, epochs=3)
    assert settings(*flags, "--config", toml) == overruled
    assert settings("--config", toml, *flags) == overruled


def test_config_json_of_a_run_is_a_config_file(tmp_path: Path) -> None:
    run = TrainConfig("pairs.csv", label_smoothing=0.1, loss="clip", name="first")
    extra = {"command": ["himo"], "versions": {"himo": "0"}, "starts": [{"step": 0}]}
    content = json.dumps(dataclasses.asdict(run) | extra)
    path = written(tmp_path / "config.json", content)
    assert settings("--config", path) == run


def test_config_json_is_a_config_file_as_a_run_writes_it(tmp_path: Path) -> None:
    run = TrainConfig("pairs.csv", lr=1e-3, logs=str(tmp_path), name="first")
    run_folder.start(run, None, [], {"lr": 1e-3})
    assert settings("--config", run.folder / "config.json") == run


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", "epochs = 3\n"), ("a.json", '{"epochs": 3}')],
    ids=["toml", "json"],
)
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    flags = ("--train-data", "pairs.csv", "--config", tmp_path / name)
    assert settings(*flags) == TrainConfig("pairs.csv", epochs=3)


CLIP = {"loss": "clip"}
VALIDATION = "a validation, from --val-data or --held-out"
# (flag, value, flags without which nothing reads it, flags with which it is read, what is expected)
UNREAD = [
    ("activation", "gelu", {}, {"pretrained": "x"}, "--pretrained beside it"),
    ("vision_heads", 2, {}, {"pretrained": "x"}, "--pretrained beside it"),
    ("text_heads", 2, {}, {"pretrained": "x"}, "--pretrained beside it"),
    ("val_frequency", 2, {}, {"held_out": 4}, VALIDATION),
    ("val_himo", True, {}, {"val_data": "x.csv"}, VALIDATION),
    ("patience", 2, {}, {"held_out": 4}, VALIDATION),
    ("lock_image_unlocked_groups", 1, {}, {"lock_image": True}, "--lock-image beside it"),
    ("lock_text_unlocked_layers", 1, {}, {"lock_text": True}, "--lock-text beside it"),
    ("preset", "official", CLIP, {}, "--loss himo, got clip"),
    ("tau", 0.8, CLIP, {}, "--loss himo, got clip"),
    ("lambda_comp", 1.0, CLIP, {}, "--loss himo, got clip"),
    ("lambda_global", 0.5, CLIP, {}, "--loss himo, got clip"),
    ("decompose_images", True, CLIP, {}, "--loss himo, got clip"),
    ("gap_eps", 1e-3, CLIP, {}, "--loss himo, got clip"),
    ("cuda_graph_head", True, CLIP, {}, "--loss himo, got clip"),
    (
        *("epochs_cooldown", 1, {}, {"lr_scheduler": "const-cooldown"}),
        "--lr-scheduler const-cooldown beside it",
    ),
    ("allow_changes", "lr", {}, {"resume": "latest"}, "--resume beside it"),
]


@pytest.mark.parametrize(("name", "value", "without", "beside", "expected"), UNREAD)
def test_a_flag_that_nothing_reads_is_refused(
    tmp_path: Path,
    name: str,
    value: object,
    without: dict[str, object],
    beside: dict[str, object],
    expected: str,
) -> None:
    default = next(item.default for item in dataclasses.fields(TrainConfig) if item.name == name)
    path = tmp_path / "run.json"

    def read(given: dict[str, object]) -> TrainConfig:
        path.write_text(json.dumps({"train_data": "x.csv", **given}))
        return settings("--config", path)

    with pytest.raises(HimoError) as error:
        read({**without, name: value})
    assert str(error.value) == f"--{name.replace('_', '-')}: expected {expected}"
    # Its default is as good as not given.
    assert getattr(read({**without, name: default}), name) == default
    assert getattr(read({**beside, name: value}), name) == value


@pytest.mark.parametrize("value", [["himo"], {"himo": 1}, []], ids=str)
@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(TrainConfig)])
def test_a_list_or_an_object_is_no_value_of_a_flag(
    name: str, value: object, tmp_path: Path
) -> None:
    file = written(tmp_path / "run.json", json.dumps({name: value}))
    with pytest.raises(HimoError) as error:
        settings("--config", file)
    assert str(error.value).startswith(f"{file}: {name}: expected ")
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lock_image": True, "lock_text": True}, "--lock-text: expected no --lock-image beside"),
        (
            {"lock_image": True, "lock_text": True, "layer_decay": 0.5},
            "or a part of a tower to train, with --lock-image-unlocked-groups or --lock-text-unlo",
        ),
        ({"lambda_comp": 0, "lambda_global": 0}, "--lambda-comp: expected more than 0 beside"),
        ({"grad_clip_norm": 0}, "--grad-clip-norm: expected more than 0, got 0"),
    ],
)
def test_a_run_that_trains_nothing_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(HimoError, match=message):
        TrainConfig("x.csv", **given)


@pytest.mark.parametrize(
    "given",
    [
        {"lock_image": True},
        {"lock_text": True},
        {"lock_image": True, "lock_text": True, "lock_image_unlocked_groups": 1},
        {"lock_image": True, "lock_text": True, "lock_text_unlocked_layers": 1},
        {"lambda_comp": 0},
        {"lambda_global": 0},
        {"preset": "official", "lambda_comp": 0},
    ],
)
def test_a_run_that_trains_a_part_is_not(given: dict[str, object]) -> None:
    settings = TrainConfig("x.csv", **given)
    assert {name: getattr(settings, name) for name in given} == given


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"learning-rte": 1}', "unknown key 'learning-rte'; the nearest flag is --"),
        ("a.toml", "warm_up = 1", "unknown key 'warm_up'; the nearest flag is --warmup"),
        ("a.json", '{"": 1}', "unknown key ''; the nearest flag is --"),
        ("a.json", '{"lr": "high"}', "lr: expected a number, got 'high'"),
        ("a.json", '{"lr": true}', "lr: expected a number, got True"),
        ("a.json", '{"epochs": 1.5}', "epochs: expected an integer, got 1.5"),
        ("a.toml", "lock-text = 1", "lock-text: expected true or false, got 1"),
        ("a.toml", "name = []", "name: expected a text, got []"),
        ("a.json", '{"loss": "l2"}', "loss: expected himo or clip, got 'l2'"),
        ("a.json", '{"loss": []}', "loss: expected himo or clip, got []"),
        ("a.json", '{"batch-size": 4, "batch_size": 8}', "batch_size is given twice"),
        ("a.json", '{"batch_size": 1}', "--batch-size: expected at least 2, got 1"),
        ("a.json", "[]", "expected an object of flags and values, got []"),
        ("a.json", "{", "a.json: cannot be read: "),
        ("a.toml", "x = ", "a.toml: cannot be read: "),
        ("a.toml", "x = " + "[" * 100_000, "a.toml: cannot be read: "),
        ("a.yaml", "lr: 1", "expected a name that ends in .json or .toml"),
        ("a.json", " " * (1 << 20) + "{}", "expected at most 1,048,576 bytes"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(HimoError) as error:
        settings("--train-data", "pairs.csv", "--config", path)
    assert message in str(error.value) and len(str(error.value)) < len(str(path)) + 200


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HimoError, match=r"none\.json: cannot be read: no such file"):
        settings("--config", tmp_path / "none.json")


def test_the_help_has_each_flag_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    parser.print_help()
    parts = capsys.readouterr().out.split("\n\n")
    titles = [part.partition(":")[0] for part in parts[1:]]
    assert titles == ["options", "data", "validation", "model", "loss", "optimisation", "records"]
    assert "--" not in parts[1].replace("--help", "").replace("--config", "")
    assert "--tau FLOAT" in parts[titles.index("loss") + 1]
