"""What a resumed run has to share with its checkpoint, setting by setting and datum by datum."""

import argparse
import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from train_runs import lines, photos, refused, small_model, train_here

from himo import resume
from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.cli import main
from himo.config import AT_RESUME, TrainConfig, add_arguments
from himo.data import open_dataset
from himo.errors import HimoError
from himo.model import CONFIGS
from himo.train import learning_rate
from himo.training_state import find_state, saved_states, set_aside

# A value for each flag that is neither its default nor the value in `settings`.
OTHERS = {
    "train_data": "b.csv",
    "val_data": "v.csv",
    "dataset_type": "csv",
    "image_root": "photos",
    "csv_separator": ";",
    "csv_img_key": "file",
    "csv_caption_key": "text",
    "train_num_samples": 8,
    "max_bad_fraction": 0.5,
    "image_mode": "fast",
    "workers": 0,
    "token_cache": False,
    "held_out": 3,
    "val_frequency": 2,
    "patience": 3,
    "recipe": "paper-b16",
    "activation": "gelu",
    "vision_heads": 4,
    "text_heads": 4,
    "model": "ViT-B-32",
    "pretrained": "start.pt",
    "lock_image_unlocked_groups": 1,
    "lock_text_unlocked_layers": 1,
    "loss": "clip",
    "preset": "official",
    "tau": 0.8,
    "lambda_global": 0.5,
    "lambda_comp": 0.5,
    "label_smoothing": 0.2,
    "gap_eps": 1e-3,
    "log_scale": 4.0,
    "batch_size": 64,
    "accum_freq": 2,
    "epochs": 11,
    "lr": 1e-5,
    "wd": 0.1,
    "beta1": 0.8,
    "beta2": 0.99,
    "eps": 1e-6,
    "warmup": 10,
    "grad_clip_norm": 1.0,
    "layer_decay": 0.7,
    "lr_scheduler": "const",
    "epochs_cooldown": 2,
    "ema": 0.99,
    "on_nonfinite": "skip",
    "exchange": "ring",
    "rank_timeout": 30.0,
    "precision": "amp",
    "seed": 1,
    "device": "cpu",
    "threads": 1,
    "logs": "others",
    "name": "mine",
    "log_every_n_steps": 1,
    "save_frequency": 2,
    "save_every_n_steps": 5,
    "keep_checkpoints": 0,
    "report_to": "tensorboard",
    "resume": "latest",
    "allow_changes": "lr",
}
# What a flag is refused without.
NEEDED = {
    **{name: {"held_out": 2} for name in ("val_frequency", "val_himo", "patience")},
    "lock_image_unlocked_groups": {"lock_image": True},
    "lock_text_unlocked_layers": {"lock_text": True},
    "epochs_cooldown": {"lr_scheduler": "const-cooldown", "epochs_cooldown": 1},
    "allow_changes": {"resume": "latest"},
}
# What a recipe chooses, as a run records it: the paper's values.
CHOSEN = {"batch_size": 128, "accum_freq": 1, "epochs": 10, "lr": 1e-6, "wd": 1e-2, "warmup": 200}
FLAGS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
PATH = Path("state-00000003.safetensors")


def conditions(processes: int = 1, **given) -> dict:
    """As `resume.record` makes them, without data: as JSON has them back."""
    settings = dataclasses.asdict(
        TrainConfig(**{"train_data": "a.csv", "pretrained": "clip.pt", **CHOSEN, **given})
    )
    model = dataclasses.asdict(CONFIGS["tiny"])
    record = {"settings": settings, "processes": processes, "model": model}
    return json.loads(json.dumps(record))


def test_every_flag_has_one_rule():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    others = ("help", "config")  # the file of --config holds flags
    flags = sorted(action.dest for action in parser._actions if action.dest not in others)
    assert sorted(name for names in AT_RESUME.values() for name in names) == flags


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_that_differs_is_refused_said_or_free(name):
    (rule,) = (rule for rule, names in AT_RESUME.items() if name in names)
    value = OTHERS.get(name, True)
    needed = NEEDED.get(name, {})
    before, now = conditions(**needed), conditions(**needed | {name: value})
    assert resume.check(before, before, [], PATH) == []
    flag = f"--{name.replace('_', '-')} "
    if rule == "ignore":
        assert resume.check(before, now, [], PATH) == []
    elif rule == "say":
        (change,) = resume.check(before, now, [], PATH)
        assert change.name == name and change.values() == [before["settings"][name], value]
        assert change.note() == f"{flag}{value} (before {before['settings'][name]})"
    else:
        with pytest.raises(HimoError, match=f"expected {flag}.* as it began, got {value}") as error:
            resume.check(before, now, [], PATH)
        allowed = rule == "refuse" and name not in ("batch_size", "accum_freq")
        advice = f"--allow-changes {name.replace('_', '-')} goes on" if allowed else "start a new"
        assert advice in str(error.value)
    if rule == "refuse" and name not in ("batch_size", "accum_freq"):
        (change,) = resume.check(before, now, [name], PATH)
        preset = {"tau": 0.9, "lambda_comp": 1.0, "lambda_global": 1.0, "label_smoothing": 0.0}
        assert change.values() == [preset.get(name, before["settings"][name]), value]
    if rule == "never":
        with pytest.raises(HimoError):
            resume.check(before, now, [name], PATH)


def test_several_changes_are_one_message_and_one_remedy():
    with pytest.raises(HimoError) as error:
        resume.check(conditions(), conditions(lr=1e-3, tau=0.5, wd=1.0), ["wd"], PATH)
    message = str(error.value)
    assert "--lr 1e-06 as it began, got 0.001" in message and "--tau 0.9 as it" in message
    assert "--allow-changes tau,lr goes on" in message and "--wd" not in message


def test_a_value_of_the_preset_is_no_change():
    now = conditions(tau=0.9, lambda_comp=1.0, label_smoothing=0.0)
    assert resume.check(conditions(), now, [], PATH) == []
    plain, same = conditions(loss="clip"), conditions(loss="clip", label_smoothing=0.0)
    assert resume.check(plain, same, [], PATH) == []
    with pytest.raises(HimoError, match="--tau 0.9 as it began, got 0.85"):
        resume.check(
            conditions(tau=0.9, preset="official"), conditions(preset="official"), [], PATH
        )


def test_the_pairs_of_a_step_may_be_split_another_way_and_never_be_others():
    before, allowed = conditions(batch_size=64), ["batch_size", "accum_freq", "processes"]
    for split in ({"batch_size": 16, "accum_freq": 4}, {"batch_size": 32, "processes": 2}):
        with pytest.raises(HimoError, match="--allow-changes "):
            resume.check(before, conditions(**split), [], PATH)
        names = {change.name for change in resume.check(before, conditions(**split), allowed, PATH)}
        assert names == split.keys()
    with pytest.raises(HimoError, match="pairs in a step 64 as it began, got 128; start a new run"):
        resume.check(before, conditions(batch_size=128), allowed, PATH)


def test_another_model_is_never_the_same_run():
    now = conditions()
    now["model"]["text_heads"] *= 2  # in no shape of the state
    with pytest.raises(HimoError, match="a model with text_heads 2 as it began, got 4; start"):
        resume.check(conditions(), now, ["pretrained"], PATH)


def test_a_flag_that_was_not_known_then_is_not_compared():
    before = conditions()
    del before["settings"]["gap_eps"], before["settings"]["accum_freq"], before["model"]
    assert resume.check(before, conditions(gap_eps=0.1), [], PATH) == []
    assert resume.unchecked(before) == "the data and the model's configuration"
    with pytest.raises(HimoError, match="--train-data a.csv as it began, got b.csv"):
        resume.check(before, conditions(train_data="b.csv"), [], PATH)


@pytest.mark.parametrize(
    "given, message",
    [
        ("seed", "got 'seed'"),
        ("workers", "got 'workers'"),
        ("lr,colour", "got 'colour'"),
        ("model", "got 'model'"),
        ("all", "got 'all'"),
    ],
)
def test_what_cannot_be_allowed_is_named(given, message):
    with pytest.raises(HimoError, match=f"--allow-changes: expected names of .*{message}"):
        TrainConfig(train_data="x", resume="latest", allow_changes=given)


def test_names_are_taken_as_a_user_writes_them():
    given = "--train-data, lr,lambda_comp,"
    settings = TrainConfig(train_data="x", resume="latest", allow_changes=given)
    assert settings.allowed == ["train_data", "lr", "lambda_comp"]


@pytest.fixture
def data(tmp_path) -> Path:
    """A csv of 6 pairs."""
    for number in range(6):
        Image.new("RGB", (20, 20), 40 * number).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,A card {number}.\n" for number in range(6)]
    (tmp_path / "a.csv").write_text("filepath,title\n" + "".join(rows))
    return tmp_path / "a.csv"


def with_data(train_data: Path, val_data: Path | None = None, **given) -> dict:
    paths = {"train_data": str(train_data), "val_data": val_data and str(val_data)}
    settings = TrainConfig(**paths, **CHOSEN, **given)
    opened = [path and open_dataset(path) for path in (train_data, val_data)]
    record = resume.record(settings, 1, CONFIGS["tiny"], *opened)
    return json.loads(json.dumps(record))


def edit(text: str, new: str):
    return lambda csv: csv.write_text(csv.read_text().replace(text, new))


@pytest.mark.parametrize(
    "damage, words, can_be_allowed",
    [
        (edit("card 3", "ship 3"), "--train-data of 6 pairs .SHA-256 ", True),
        (edit("3.png,A card 3.\n", ""), "got 5 pairs .SHA-256 ", False),
        (edit("1.png,", "5.png,"), "SHA-256", True),
        (lambda csv: csv.write_text(csv.read_text() + "0.png,One more.\n"), "got 7 pairs", False),
        (
            lambda csv: csv.write_text(
                "filepath,title\n" + "\n".join(csv.read_text().splitlines()[:0:-1])
            ),
            "SHA-256",
            True,
        ),
        (
            lambda csv: Image.new("RGB", (20, 20), 99).save(csv.parent / "3.png"),
            "--train-data whose 3.png is .*; 1 of 6 pictures looked at are others",
            True,
        ),
    ],
    ids=["a caption", "a row less", "an image of another row", "a row more", "order", "a picture"],
)
def test_other_data_under_one_name_are_other_data(damage, words, can_be_allowed, data):
    before = with_data(data)
    damage(data)
    now = with_data(data)
    with pytest.raises(HimoError, match=words):
        resume.check(before, now, [], PATH)
    if can_be_allowed:
        (change,) = resume.check(before, now, ["train_data"], PATH)
        assert change.name == "train_data"
    else:
        with pytest.raises(HimoError, match="start a new run"):
            resume.check(before, now, ["train_data"], PATH)


def test_other_pictures_under_the_names_of_a_shard_are_other_data(tmp_path):
    def write(shade: int) -> None:
        with tarfile.open(tmp_path / "shard.tar", "w") as shard:
            for number in range(4):
                picture = io.BytesIO()
                Image.new("RGB", (20, 20), shade + number).save(picture, "png")
                for name, data in (("png", picture.getvalue()), ("txt", b"A card.")):
                    member = tarfile.TarInfo(f"{number}.{name}")
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))

    write(10)
    before = with_data(tmp_path / "shard.tar")
    write(20)
    with pytest.raises(HimoError, match="--train-data whose 0.png is .* 4 of 4 pictures"):
        resume.check(before, with_data(tmp_path / "shard.tar"), [], PATH)


def test_data_that_moved_are_the_same_data(data, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "data"
    before = with_data(data, data)
    shutil.copytree(data.parent, moved)
    changes = resume.check(before, with_data(moved / "a.csv", moved / "a.csv"), [], PATH)
    assert [(change.name, change.rule) for change in changes] == [
        ("train_data", "say"),
        ("val_data", "say"),
    ]


def test_a_picture_that_cannot_be_read_is_not_another(data):
    before = with_data(data)
    (data.parent / "3.png").unlink()
    now = with_data(data)
    assert now["train_data"]["pictures"]["3.png"] is None
    assert resume.check(before, now, [], PATH) == []
    assert resume.check(now, before, [], PATH) == []


def test_other_validation_data_are_refused_and_allowed_by_their_flag(data):
    held_out = data.with_name("v.csv")
    shutil.copy(data, held_out)
    before = with_data(data, held_out)
    edit("card 3", "ship 3")(held_out)
    for now in (with_data(data, held_out), with_data(data)):
        with pytest.raises(HimoError, match="expected --val-data"):
            resume.check(before, now, [], PATH)
        assert [c.name for c in resume.check(before, now, ["val_data"], PATH)] == ["val_data"]


def test_of_a_large_set_64_pictures_are_looked_at(data):
    rows = "".join(f"{n % 6}.png,A card {n}.\n" for n in range(640))
    data.write_text("filepath,title\n" + rows)
    index = open_dataset(data)
    opened = []
    index.image_source = lambda row: opened.append(row) or f"{data.parent}/{row % 6}.png"
    resume.record(TrainConfig(train_data="x"), 1, CONFIGS["tiny"], index, None)
    assert opened == list(range(0, 640, 10))


# Whole runs, in this process: of 24 pairs in batches of 8.


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(csv, logs, flags) of a run of one epoch, with a state after each of its 3 steps."""
    folder = tmp_path_factory.mktemp("begun")
    pairs, small = photos(folder), small_model(folder)
    flags = ["--epochs", "1", "--save-every-n-steps", "1", "--keep-checkpoints", "0"]
    assert train_here(pairs, folder / "logs", *small, *flags) == 0
    return pairs, folder / "logs", small


@pytest.fixture
def run(begun, tmp_path) -> tuple[Path, Path, list[str]]:
    """A copy of it."""
    pairs, logs, small = begun
    shutil.copytree(logs, tmp_path / "logs")
    return pairs, tmp_path / "logs", small


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_resume_writes_nothing(run, capsys):
    pairs, logs, small = run
    before = snapshot(logs)
    flags = ["--epochs", "1", "--resume", "latest", "--lr", "5", "--image-mode", "fast"]
    message = refused(capsys, pairs, logs, *small, *flags)
    assert "--lr 0.001 as it began, got 5.0" in message
    assert "--image-mode exact as it began, got fast" in message
    assert "--allow-changes image-mode,lr goes on" in message
    assert snapshot(logs) == before


def test_other_captions_are_refused_or_allowed_and_recorded(run, capsys, tmp_path):
    _, logs, small = run
    pairs = photos(tmp_path)
    edit("A plain card", "Something else")(pairs)
    flags = ["--epochs", "1", "--resume", f"{logs}/run/checkpoints/state-00000002.safetensors"]
    message = refused(capsys, pairs, logs, *small, *flags)
    assert "expected --train-data of 24 pairs [SHA-256 " in message
    assert train_here(pairs, logs, *small, *flags, "--allow-changes", "train-data") == 0
    assert "goes on with changes: --train-data " in capsys.readouterr().err
    *_, event, last = lines(logs)
    assert event["step"] == 2 and last["step"] == 3
    before, now = event["resumed"]["changes"]["train_data"]
    assert before != now and before.startswith("24 pairs [SHA-256 ")
    assert event["resumed"]["unreadable_lines"] == 0
    # The next start is compared with what the run was continued with.
    assert train_here(pairs, logs, *small, "--epochs", "1", "--resume", "latest") == 0


def test_a_longer_run_goes_on_along_the_longer_cosine(run, capsys, tmp_path):
    pairs, logs, small = run
    assert "--epochs 1 as it began, got 2" in refused(
        capsys, pairs, logs, *small, "--resume", "latest"
    )
    assert train_here(pairs, logs, *small, "--resume", "latest", "--allow-changes", "epochs") == 0
    output = capsys.readouterr()
    settings = TrainConfig(train_data="x", lr=1e-3, warmup=2, epochs=2)
    rates = [learning_rate(step, 6, settings) for step in range(6)]
    assert f"goes on after step 3, at a learning rate of {rates[3]:.3g}" in output.out
    assert [row["lr"] for row in lines(logs) if row["step"] > 3] == rates[3:]
    starts = json.loads((logs / "run/config.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]
    assert starts[0]["changes"] == {} and starts[1]["changes"]["epochs"] == [1, 2]
    report = ["report", str(logs / "run"), "--out", str(tmp_path / "report.html")]
    assert main(report) == 0
    assert (
        "From step 3 on the run has other settings: epochs 1 → 2."
        in (tmp_path / "report.html").read_text()
    )
    assert (
        json.loads((tmp_path / "report.json").read_text())["runs"][0]["last_metrics"]["step"] == 6
    )
    shorter = ["--resume", "latest", "--epochs", "1", "--allow-changes", "epochs"]
    assert "--epochs: expected at least 2, begun before, got 1" in refused(
        capsys, pairs, logs, *small, *shorter
    )


def test_states_of_the_way_left_are_set_aside(run):
    pairs, logs, small = run
    checkpoints = logs / "run/checkpoints"
    first = checkpoints / "state-00000001.safetensors"
    flags = ["--epochs", "1", "--resume", str(first), "--lr", "1e-2", "--allow-changes", "lr"]
    assert train_here(pairs, logs, *small, *flags) == 0
    assert [path.name for path in saved_states(checkpoints)] == [
        "state-00000001.safetensors",
        "state-00000003.safetensors",
    ]
    assert sorted(path.name for path in checkpoints.glob("*.set-aside")) == [
        "state-00000002.safetensors.set-aside",
        "state-00000003.safetensors.set-aside",
    ]
    assert find_state("latest", checkpoints).record["settings"]["lr"] == 1e-2


def test_a_folder_takes_up_no_state_of_another_run(run, begun, capsys):
    pairs, logs, small = run
    other = begun[1] / "run/checkpoints/state-00000002.safetensors"
    flags = ["--epochs", "1", "--resume", str(other)]
    assert "already holds another run" in refused(capsys, pairs, logs, *small, *flags)
    (logs / "run/metrics.jsonl").unlink()
    assert "already holds a run" in refused(capsys, pairs, logs, *small, "--epochs", "1")
    assert train_here(pairs, logs, *small, *flags, "--name", "new") == 0
    assert [row["step"] for row in map(json.loads, (logs / "new/metrics.jsonl").open())] == [3]


def test_a_checkpoint_of_an_older_himo_goes_on_and_says_what_it_cannot_tell(run, capsys):
    # As they were before: the settings, and nothing of the data or the model.
    pairs, logs, small = run
    state = saved_states(logs / "run/checkpoints")[-1]
    with open(state, "rb") as file:
        tensors, metadata = read_safetensors(file, str(state))
    record = json.loads(metadata.pop("himo_training_state"))
    for name in ("train_data", "val_data", "model"):
        del record[name]
    metadata.pop("himo_sha256")
    write_safetensors(str(state), tensors, {"himo_training_state": json.dumps(record)})
    assert train_here(pairs, logs, *small, "--epochs", "1", "--resume", "latest") == 0
    assert "cannot tell whether the data and the model's configuration are the same" in (
        capsys.readouterr().err
    )


def test_one_bad_byte_of_the_metrics_costs_its_own_line(run, capsys, tmp_path):
    pairs, logs, small = run
    metrics = logs / "run/metrics.jsonl"
    first, second, third = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + second.replace(b'"loss"', b'"lo\xffs"') + third + b"\0" * 5000)
    assert train_here(pairs, logs, *small, "--epochs", "1", "--resume", "latest") == 0
    assert "metrics.jsonl: 2 unreadable lines are left out" in capsys.readouterr().err
    one, three, event = lines(logs)
    assert (one["step"], three["step"]) == (1, 3)
    assert event == {"step": 3, "resumed": {"changes": {}, "unreadable_lines": 2}}
    assert main(["report", str(logs / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert (
        "2 unreadable lines left out when the run was resumed at step 3"
        in (tmp_path / "report.html").read_text()
    )


def test_only_files_named_by_a_run_are_its_states(tmp_path):
    names = [
        "state-00000009",
        "state-00000010",
        "state-100000000",
        "state-00000011 copy",
        "state-x",
    ]
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    assert [path.stem for path in saved_states(tmp_path)] == [names[0], names[1], names[2]]
    assert [path.name for path in set_aside(tmp_path, 9)] == [
        f"{name}.safetensors.set-aside" for name in names[1:3]
    ]
