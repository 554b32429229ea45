"""Run folders with damaged, planted and left-over files: a resume goes on or ends with one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz_corpus import bounded, corpus
from train_runs import photos, small_model, train_here

from himo.checkpoint.safetensors_files import read_safetensors, write_safetensors
from himo.cli import main
from himo.files import hidden_path

STATE = "checkpoints/state-00000003.safetensors"
TEMPORARY = ".himo-0123456789abcdef.tmp"
GOES_ON, REFUSED = 0, 2
Damage = Callable[[Path], object]


def content(name: str, new: bytes) -> Damage:
    return lambda run: (run / name).write_bytes(new)


def appended(name: str, more: bytes) -> Damage:
    return lambda run: (run / name).write_bytes((run / name).read_bytes() + more)


def replaced(name: str, make: Damage) -> Damage:
    """Another thing than a file in the place of one."""

    def damage(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return damage


def bad_byte(name: str, position: float) -> Damage:
    def damage(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[int(position * (len(data) - 1))] ^= 0xFF
        (run / name).write_bytes(data)

    return damage


def cut(name: str, share: float) -> Damage:
    return lambda run: os.truncate(run / name, int(share * (run / name).stat().st_size))


def record(**changes: object) -> Damage:
    """A state whose digest is right and whose record has other values; None leaves one out."""

    def damage(run: Path) -> None:
        with open(run / STATE, "rb") as file:
            tensors, metadata = read_safetensors(file, STATE)
        value = json.loads(metadata["himo_training_state"]) | changes
        value = {name: part for name, part in value.items() if part is not None}
        write_safetensors(str(run / STATE), tensors, {"himo_training_state": json.dumps(value)})

    return damage


def tensors(change: Callable[[dict], object]) -> Damage:
    def damage(run: Path) -> None:
        with open(run / STATE, "rb") as file:
            found, metadata = read_safetensors(file, STATE)
        change(found)
        metadata.pop("himo_sha256")
        write_safetensors(str(run / STATE), found, metadata)

    return damage


def link_to_outside(path: Path) -> None:
    (path.parents[2] / "outside").write_bytes(b"kept")
    path.symlink_to(path.parents[2] / "outside")


def hard_link_to_outside(path: Path) -> None:
    link_to_outside(path)
    path.unlink()
    path.hardlink_to(path.parents[2] / "outside")


METRICS, CONFIG, LOCK = "metrics.jsonl", "config.json", "run.lock"
INPUTS: dict[str, tuple[Damage, int]] = {
    "metrics: a bad byte": (bad_byte(METRICS, 0.3), GOES_ON),
    "metrics: a bad first byte": (bad_byte(METRICS, 0), GOES_ON),
    "metrics: no last line end": (cut(METRICS, 0.999), GOES_ON),
    "metrics: torn": (cut(METRICS, 0.8), GOES_ON),
    "metrics: empty": (content(METRICS, b""), GOES_ON),
    "metrics: gone": (lambda run: (run / METRICS).unlink(), GOES_ON),
    "metrics: a tail of NULs": (appended(METRICS, b"\0" * 100_000), GOES_ON),
    "metrics: NULs alone": (content(METRICS, b"\0" * 4096), GOES_ON),
    "metrics: NULs before a line": (appended(METRICS, b"\0" * 9 + b'{"step": 3}\n'), GOES_ON),
    "metrics: too deep": (appended(METRICS, b"[" * 100_000 + b"\n"), GOES_ON),
    "metrics: a line of 20 MB": (appended(METRICS, b"x" * 20_000_000 + b"\n"), GOES_ON),
    "metrics: a sparse tail of 1 GiB": (lambda run: os.truncate(run / METRICS, 1 << 30), GOES_ON),
    "metrics: a number of 5,000 digits": (
        appended(METRICS, b'{"step": ' + b"9" * 5000 + b"}\n"),
        GOES_ON,
    ),
    "metrics: a step of 400 digits": (
        appended(METRICS, b'{"step": ' + b"9" * 400 + b"}\n"),
        GOES_ON,
    ),
    "metrics: steps of all kinds": (
        appended(METRICS, b'{"step": NaN}\n{"step": "1"}\n{"step": true}\n[3]\n3\nnull\n{}\n'),
        GOES_ON,
    ),
    "metrics: events of all kinds": (
        appended(
            METRICS,
            b'{"step": 3, "resumed": 1}\n{"step": 3, "resumed": {"changes": {"lr": 1, "": []}}}\n'
            b'{"step": 3, "resumed": {"changes": [], "unreadable_lines": 1e999}}\n',
        ),
        GOES_ON,
    ),
    "metrics: UTF-16": (content(METRICS, '{"step": 1}\n'.encode("utf-16")), GOES_ON),
    "metrics: a directory": (replaced(METRICS, Path.mkdir), REFUSED),
    "metrics: a FIFO": (replaced(METRICS, os.mkfifo), REFUSED),
    "metrics: a link to a device": (
        replaced(METRICS, lambda path: path.symlink_to("/dev/zero")),
        REFUSED,
    ),
    "config: a bad byte": (bad_byte(CONFIG, 0), GOES_ON),
    "config: a list": (content(CONFIG, b"[1]"), GOES_ON),
    "config: too deep": (content(CONFIG, b"[" * 100_000), GOES_ON),
    "config: gone": (lambda run: (run / CONFIG).unlink(), GOES_ON),
    "config: starts of another kind": (content(CONFIG, b'{"starts": {"lr": [[]]}}'), GOES_ON),
    "config: a directory": (replaced(CONFIG, Path.mkdir), GOES_ON),
    "config: a FIFO": (replaced(CONFIG, os.mkfifo), GOES_ON),
    "config: a link to itself": (replaced(CONFIG, lambda path: path.symlink_to(path)), GOES_ON),
    "state: a bad byte": (bad_byte(STATE, 0.5), REFUSED),
    "state: cut off": (cut(STATE, 0.5), REFUSED),
    "state: empty": (content(STATE, b""), REFUSED),
    "state: a directory": (replaced(STATE, Path.mkdir), REFUSED),
    "state: a FIFO": (replaced(STATE, os.mkfifo), REFUSED),
    "state: a newer one that is none": (
        lambda run: (run / STATE.replace("3", "9")).write_bytes(b"x" * 100),
        REFUSED,
    ),
    "state: a name of a copy": (
        lambda run: (run / STATE.replace("3", "3 (copy)")).write_bytes(b"x"),
        GOES_ON,
    ),
    "state: no random state": (tensors(lambda found: found.pop("random/torch")), REFUSED),
    "state: a random state of another length": (
        tensors(lambda found: found.update({"random/torch": found["random/torch"][:9].clone()})),
        REFUSED,
    ),
    "state: moments of another shape": (
        tensors(
            lambda found: found.update(
                {n: part[:1].clone() for n, part in found.items() if "exp_avg" in n and part.dim()}
            )
        ),
        REFUSED,
    ),
    **{
        f"record: {name} {str(value)[:20]}": (record(**{name: value}), REFUSED)
        for name, value in [
            ("step", "3"),
            ("step", -1),
            ("random", [1]),
            ("random", [3, ["x"], None]),
            ("sampler", {}),
            ("sampler", {"length": 24, "seed": 0, "epoch": -1, "position": 0}),
            ("sampler", {"length": 24, "seed": 0, "epoch": 0, "position": 99}),
            ("sampler", {"length": 24, "seed": 0, "epoch": 1e400, "position": 0}),
            ("bad_samples", {"reasons": {"x": "y"}}),
            ("bad_samples", {"reasons": {"99": "missing"}}),
            ("bad_samples", None),
            ("settings", {}),
            ("settings", {"batch_size": "8", "loss": [], "preset": {}}),
            ("settings", None),
            ("processes", "two"),
            ("train_data", {"sha256": 3}),
            ("train_data", {"sha256": "0" * 64, "pairs": "x", "pictures": 3}),
            ("train_data", [1]),
            ("model", [1]),
        ]
    },
    "temporary files: a killed save": (content(TEMPORARY, b"half"), GOES_ON),
    "temporary files: hundreds": (
        lambda run: [hidden_path(run / "checkpoints").touch() for _ in range(300)],
        GOES_ON,
    ),
    "temporary files: a link": (lambda run: link_to_outside(run / TEMPORARY), GOES_ON),
    "temporary files: a directory": (lambda run: (run / TEMPORARY).mkdir(), GOES_ON),
    "temporary files: a FIFO": (lambda run: os.mkfifo(run / TEMPORARY), GOES_ON),
    "temporary files: no permissions": (lambda run: (run / TEMPORARY).touch(0o000), GOES_ON),
    "lock: left behind": (content(LOCK, b"process 1 on elsewhere"), GOES_ON),
    "lock: text of others": (content(LOCK, b"\x1b[2J\xff" * 1000), GOES_ON),
    "lock: a link": (replaced(LOCK, link_to_outside), REFUSED),
    "lock: a link to itself": (replaced(LOCK, lambda path: path.symlink_to(path)), REFUSED),
    "lock: a hard link": (replaced(LOCK, hard_link_to_outside), REFUSED),
    "lock: a directory": (replaced(LOCK, Path.mkdir), REFUSED),
    "lock: a FIFO": (replaced(LOCK, os.mkfifo), REFUSED),
    "folder: checkpoints are a file": (
        lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()),
        REFUSED,
    ),
    "folder: a link to nothing": (
        lambda run: (shutil.rmtree(run), run.symlink_to("nothing")),
        REFUSED,
    ),
    "folder: a file": (lambda run: (shutil.rmtree(run), run.touch()), REFUSED),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(csv, logs, flags) of a run of one epoch."""
    folder = tmp_path_factory.mktemp("begun")
    pairs, flags = photos(folder), [*small_model(folder), "--epochs", "1"]
    assert train_here(pairs, folder / "logs", *flags) == 0
    return pairs, folder / "logs", flags


@pytest.mark.parametrize("given", corpus(INPUTS))
def test_a_run_folder_of_any_state_is_taken_up_or_refused(given, begun, tmp_path, capsys):
    damage, expected = given
    pairs, logs, flags = begun
    shutil.copytree(logs, tmp_path / "logs")
    damage(tmp_path / "logs/run")
    with bounded(seconds=10, mebibytes=300):
        status = train_here(pairs, tmp_path / "logs", *flags, "--resume", "latest")
    output = capsys.readouterr()
    assert status == expected, output
    said = [line for line in output.err.split("\n") if line.startswith("himo: error: ")]
    assert len(said) == (expected == REFUSED) and all(len(line) < 600 for line in said), said
    assert output.err.isascii() or all(c.isprintable() for c in output.err if c not in "\r\n")
    outside = tmp_path / "outside"
    assert not outside.exists() or outside.read_bytes() == b"kept"
    if expected == GOES_ON:
        report = ["report", str(tmp_path / "logs/run"), "--out", str(tmp_path / "report.html")]
        assert main(report) == 0
        metrics = tmp_path / "logs/run/metrics.jsonl"
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        assert all(json.loads(row)["step"] <= 3 for row in rows)
    shutil.rmtree(tmp_path)
