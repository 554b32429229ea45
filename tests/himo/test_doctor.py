"""`himo doctor`: a line for each check, and the status that goes with them."""

import io
import os
import re
import resource
import tarfile
from pathlib import Path

import pytest
import torch
from captioned_files import write_csv, write_images

import himo
from himo.cli import main
from himo.config import TrainConfig
from himo.model import CONFIGS, HiMoCLIP
from himo.tools.doctor import schedule, smoke, system
from himo.tools.doctor.check import Check

FLAGS = ["--model", "tiny", "--batch-size", "4", "--workers", "1", "--threads", "1"]


take_step = smoke.step


@pytest.fixture(autouse=True)
def no_step(monkeypatch):
    """Half a second less of each test that is not about the step."""
    monkeypatch.setattr(smoke, "step", lambda settings: Check("training step", "ok", "not taken"))


@pytest.fixture
def step(monkeypatch, no_step):
    monkeypatch.setattr(smoke, "step", take_step)


@pytest.fixture
def pairs(tmp_path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    names = write_images(folder, 12)
    return write_csv(folder / "pairs.csv", [(name, f"Card {name}. It is plain.") for name in names])


def examined(capsys, *flags: str, status: int) -> dict[str, list[tuple[str, str]]]:
    """(status, sentence) of the checks by name."""
    assert main(["doctor", *FLAGS, *flags]) == status
    text = capsys.readouterr().out
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if line.startswith(("ok ", "warning ", "problem ")):
            status_, name, sentence = line[:8].strip(), line[9:22].strip(), line[23:]
            found.setdefault(name, []).append((status_, sentence))
    problems = sum(kind == "problem" for checks in found.values() for kind, _ in checks)
    assert re.search(rf"^{problems or 'no'} problems?, ", text, re.MULTILINE)
    return found


def test_a_run_that_would_work(capsys, pairs, tmp_path, step):
    before = sorted(tmp_path.rglob("*"))
    found = examined(capsys, "--train-data", str(pairs), "--logs", str(tmp_path / "logs"), status=0)
    assert found["data"] == [("ok", "12 pairs (csv) of 12 records")]
    assert found["images"] == [("ok", "12 of 12 looked at can be read")]
    assert found["captions"][0][0] == "ok"
    kind, sentence = found["training step"][0]
    assert kind == "ok" and "himo loss, fp32: loss " in sentence
    for name in (
        "numpy",
        "pillow",
        "ftfy",
        "regex",
        "safetensors",
        "threads",
        "open files",
        "disk",
    ):
        assert found[name][0][0] in ("ok", "warning"), name
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_the_command_line_of_train_can_be_pasted(capsys, pairs, tmp_path):
    flags = ("--lr", "1e-4", "--name", "mine", "--warmup", "5", "--on-nonfinite", "skip")
    data = ("--train-data", str(pairs), "--logs", str(tmp_path))
    found = examined(capsys, *data, *flags, "--val-data", str(pairs), status=0)
    assert found["val data"] == found["data"] and found["val images"] == found["images"]
    absent = str(tmp_path / "absent.csv")
    found = examined(capsys, *data, "--val-data", absent, status=1)
    assert found["val data"][0][1].startswith("--val-data: ") and absent in str(found["val data"])
    assert "val images" not in found
    assert "val data" in examined(capsys, "--val-data", str(pairs), status=0)  # by itself


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--held-out", "8"], None),
        (["--held-out", "9"], "fewer left than a batch of 4"),
        (["--held-out", "9", "--keep-last-batch"], None),
        (["--held-out", "12"], "--held-out 12 leaves none"),
        (["--train-num-samples", "13"], "--train-num-samples 13: expected at most 12"),
        (["--train-num-samples", "3"], "fewer left than a batch of 4"),
        (["--held-out", "2", "--train-num-samples", "10"], None),
        (["--held-out", "2", "--train-num-samples", "11"], "expected at most 10"),
        (["--accum-freq", "4"], "fewer than a batch of 16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_whether_there_are_enough_pairs(capsys, pairs, tmp_path, flags, said):
    data = ("--train-data", str(pairs), "--logs", str(tmp_path))
    found = examined(capsys, *data, *flags, status=int(said is not None))["data"][0]
    assert found[0] == ("ok" if said is None else "problem") and (said or "") in found[1]


def test_the_kernels_report_comes_first(capsys):
    assert main(["doctor", *FLAGS]) == 0
    text = capsys.readouterr().out
    assert text.startswith("himo_kernels ") and "  info_nce: auto takes " in text


def test_data_that_a_run_would_stop_at(capsys, pairs):
    folder = pairs.parent
    (folder / "images/003.png").unlink()
    (folder / "images/004.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pairs.open("a") as file:
        file.write("../up.png\tA path that leads out.\n")
        file.write(f"images/005.png\t{'A red kite over a beach. ' * 60}\n")
    data = ["--train-data", str(pairs)]
    found = examined(capsys, *data, status=1)
    assert found["data"][0][0] == "problem"
    assert "12 pairs (csv) of 14 records, 1 bad (1 path)" in found["data"][0][1]
    (missing, which), (unread, how) = found["images"]
    assert missing == unread == "problem"
    assert which.startswith("1 of 13 images are missing (images 1 of 13); first: images/003.png")
    assert how.startswith("11 of 12 looked at can be read (1 ") and "images/004.png" in how
    assert found["captions"] == [
        ("warning", "1 of 12 looked at are longer than 248 tokens; the trainer cuts them there")
    ]
    found = examined(capsys, *data, "--skip-missing-images", "--max-bad-fraction", "0.5", status=0)
    assert [kind for kind, _ in found["data"] + found["images"]] == ["warning"] * 3


def test_flags_that_the_data_make_meaningless(capsys, pairs):
    found = examined(capsys, "--train-data", str(pairs), "--short-captions", status=1)["data"]
    assert found[0][0] == "problem" and "--short-captions: expected pairs with a " in found[0][1]


def test_fewer_pairs_than_a_batch(capsys, pairs):
    data = ["--train-data", str(pairs), "--batch-size", "13"]
    assert "fewer than a batch" in examined(capsys, *data, status=1)["data"][0][1]
    assert examined(capsys, *data, "--keep-last-batch", status=0)["data"][0][0] == "ok"


def test_no_pair_left_for_a_batch(capsys, tmp_path):
    table = write_csv(tmp_path / "one.csv", [(write_images(tmp_path, 1)[0], "A card.")])
    # Of doctor's own flags only the model: the recipe chooses the batch.
    assert main(["doctor", "--model", "tiny", "--workers", "0", "--train-data", str(table)]) == 1
    output = capsys.readouterr().out
    (said,) = re.findall(r"(?m)^problem  schedule +(.*)$", output)
    assert said == "no step: 1 of the 2 pairs of a batch; --keep-last-batch trains on fewer"
    assert "0 steps" not in output and "fewer than a batch of 2" in output


def test_the_step_takes_no_flags_of_a_checkpoint(capsys, tmp_path, step):
    path = tmp_path / "model.safetensors"
    himo.save(HiMoCLIP(CONFIGS["tiny"]), path)
    flags = ["--pretrained", str(path), "--lock-image", "--lock-text"]
    flags += ["--lock-image-unlocked-groups", "12"]
    assert examined(capsys, *flags, status=0)["training step"][0][0] == "ok"
    given = TrainConfig("x", pretrained="x", vision_heads=2, activation="gelu")
    assert smoke.step(given).status == "ok"


def test_data_that_cannot_be_opened(capsys, tmp_path):
    (tmp_path / "empty.csv").write_text("filepath,title\n")
    for name in ("nothing.json", "empty.csv"):
        found = examined(capsys, "--train-data", str(tmp_path / name), status=1)
        assert found["data"][0][0] == "problem" and name in found["data"][0][1]
        assert "images" not in found
    write_csv(tmp_path / "lost.csv", [("lost/a.png", "A card.")])
    found = examined(capsys, "--train-data", str(tmp_path / "lost.csv"), status=1)
    assert "1 of 1 images are missing" in found["data"][0][1]
    assert "--image-root" in found["data"][0][1]


def test_a_folder_that_may_not_be_listed(capsys, monkeypatch, tmp_path):
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("himo.data.records.os.listdir", refuse)
    found = examined(capsys, "--train-data", str(tmp_path), status=1)
    assert found["data"][0][0] == "problem" and "permission denied" in found["data"][0][1]
    assert "training step" in found


def test_escapes_in_a_name_do_not_reach_the_terminal(capsys, tmp_path):
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as file:
        for suffix, content in ((".png", b"no image"), (".txt", b"A kite.")):
            member = tarfile.TarInfo(f"a\x1b[2J{suffix}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    found = examined(capsys, "--train-data", str(shard), "--keep-last-batch", status=1)
    assert r"a\x1b[2J.png" in found["images"][0][1]


def test_checkpoints(capsys, tmp_path):
    path = tmp_path / "tiny.safetensors"
    himo.save(HiMoCLIP(CONFIGS["tiny"]), path)
    kind, found = examined(capsys, "--pretrained", str(path), status=0)["checkpoint"][0]
    assert kind == "ok" and "layout himo in safetensors, 7.5 M parameters" in found
    assert found.endswith("sha256 verified")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    kind, found = examined(capsys, "--pretrained", str(path), status=1)["checkpoint"][0]
    assert kind == "problem" and found.startswith(f"--pretrained: {path}: ")


def test_what_the_machine_lacks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(system, "free_bytes", lambda path: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 4096))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    found = examined(capsys, "--workers", "4", "--logs", str(tmp_path), status=1)
    assert found["disk"][0][0] == found["shared memory"][0][0] == "problem"
    assert found["open files"][0][1].endswith("ulimit -n 4096, or fewer --workers")
    assert found["threads"][0] == ("warning", found["threads"][0][1])
    assert examined(capsys, "--workers", "0", status=1)["shared memory"][0][0] == "ok"


def test_the_schedule_is_judged(capsys, pairs, tmp_path):
    data = ("--train-data", str(pairs), "--logs", str(tmp_path))
    kind, found = examined(capsys, *data, "--held-out", "2", status=0)["schedule"][0]
    assert kind == "ok"
    assert found.startswith("60 steps of 4 in 30 epochs, --lr 0.001 after --warmup 6, 2 of 10 ")
    flags = ("--recipe", "paper-b16", "--keep-last-batch")
    forced = examined(capsys, *data, *flags, "--force-warmup", status=0)["schedule"][0]
    kind, found = examined(capsys, *data, *flags, status=1)["schedule"][0]
    assert forced == ("warning", found)
    assert kind == "problem" and found.startswith("30 steps of 4 in 10 epochs, --lr 1e-06 ")
    assert "--warmup 200 takes longer than the 30 steps" in found and "left out" not in found
    assert "30 steps are few" in found and "--recipe from-scratch takes 0.001" in found
    assert "schedule" not in examined(capsys, "--val-data", str(pairs), status=0)


def test_host_memory_is_judged(capsys, monkeypatch):
    kind, found = examined(capsys, status=0)["host memory"][0]
    assert kind == "ok" and "a step of 4 pairs and 1 workers take about" in found
    monkeypatch.setattr(schedule, "free_memory", lambda device: 1000)
    kind, found = examined(capsys, status=1)["host memory"][0]
    assert kind == "problem" and found.startswith("1e+03 bytes free, ")
    assert found.endswith(
        "a smaller --batch-size, fewer --workers, or --grad-checkpointing takes less"
    )


def test_logs_that_cannot_be_written(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    found = examined(capsys, "--logs", str(file / "logs"), status=1)
    assert "is no directory that can be written to" in found["disk"][0][1]
    found = examined(capsys, "--logs", str(tmp_path / ("a" * 300)), status=1)
    assert found["disk"][0][1].endswith(": File name too long")


def test_a_device_that_is_not_there(capsys, step):
    found = examined(capsys, "--device", "cuda:77", status=1)
    assert found["device"][0][0] == found["training step"][0][0] == "problem"
    assert found["device"][0][1].startswith("--device: the device 'cuda:77' cannot be used")


def test_a_step_that_goes_wrong(capsys, monkeypatch, step):
    def broken(*arguments: object) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(smoke.Objective, "backward", broken)
    kind, found = examined(capsys, status=1)["training step"][0]
    assert kind == "problem" and found.startswith("RuntimeError: no kernel image is available; ")
    monkeypatch.setattr(
        smoke.Objective, "backward", lambda *arguments: {"loss": torch.tensor(float("nan"))}
    )
    assert "not finite" in examined(capsys, status=1)["training step"][0][1]


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(system, "_least_versions", lambda: {"pillow": "9999.0", "none-such": "1.2"})
    found = {check.name: check for check in system.packages()}
    assert found["pillow"].status == "problem" and "pip install -U" in found["pillow"].found
    assert found["none-such"].found == 'is not installed: pip install "none-such>=1.2"'
    assert found["numpy"].status == "ok"


@pytest.mark.parametrize(
    ("version", "least", "status"),
    [
        ("13.0", "13.0.0", "ok"),
        ("13.0.0", "13.0", "ok"),
        ("13.0.1", "13.0", "ok"),
        ("12.10", "12.9", "ok"),
        ("13.0", "13.0.1", "problem"),
        ("12.9.9", "13", "problem"),
    ],
)
def test_versions_are_compared_by_their_numbers(monkeypatch, version, least, status):
    monkeypatch.setattr(system, "_least_versions", lambda: {"pillow": least})
    monkeypatch.setattr(system.importlib.metadata, "version", lambda name: version)
    found = {check.name: check for check in system.packages()}
    assert found["pillow"].status == status


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "-1"], "--workers: expected 0 to 1024, got -1"),
        (["--batch-size", "0"], "--batch-size: expected at least 2, got 0"),
        (["--max-bad-fraction", "nan"], "--max-bad-fraction: expected 0.0 to 1.0, got nan"),
        (["--model", "ViT-Z"], "--model: expected one of ViT-B-32"),
        (["--save-frequency", "0"], "--save-frequency: expected at least 1, got 0"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_are_named(capsys, flags, said):
    assert main(["doctor", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"himo: error: {said}")
