"""`himo train` as a user runs it: real files, real processes, real signals."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_runs import (
    ROOT,
    command,
    digests,
    lines,
    photos,
    refused,
    small_model,
    train,
    train_here,
)

import himo
from himo.cli import main
from himo.config import TrainConfig
from himo.data import open_dataset
from himo.errors import HimoError
from himo.model import CONFIGS, HiMoCLIP
from himo.objective import rank_doubt
from himo.train import (
    MAX_LOG_SCALE,
    Objective,
    clamp_temperature,
    learning_rate,
    make_optimizer,
)
from himo.transforms import Preprocess
from himo.validation import COLUMNS as VALIDATION_COLUMNS
from himo.validation import Validation

STEPS = 6  # of a run below: 24 pairs, batches of 8, 2 epochs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole_run(pairs, tmp_path_factory) -> Path:
    logs = tmp_path_factory.mktemp("whole")
    train(pairs, logs)
    return logs


def test_a_run_leaves_what_its_readers_need(whole_run):
    rows = lines(whole_run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["samples"] == STEPS * 8 and rows[-1]["epoch"] == 2
    for row in rows:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0 and 1 <= row["rank"] <= 8
        assert row["contrastive_loss"] + row["component_loss"] == pytest.approx(row["loss"])
        assert 0 <= row["data_time_s"] <= row["step_time_s"] and row["samples_per_s"] > 0
    spectra = [row["spectrum"] for row in rows if "spectrum" in row]
    assert len(spectra) == 3  # of the first step, and of the first with each new epoch number
    assert all(sum(spectrum) == pytest.approx(1, abs=1e-4) for spectrum in spectra)
    config = json.loads((whole_run / "run/config.json").read_text())
    assert config["loss"] == "himo" and config["batch_size"] == 8 and "torch" in config["versions"]
    model, preprocess = himo.load(whole_run / "run/checkpoints/epoch_2.safetensors")
    assert model.provenance["training"]["step"] == STEPS
    assert preprocess.resolution == 64
    assert not list(whole_run.rglob("*.tmp"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(pairs, whole_run, tmp_path):
    train(pairs, tmp_path, "--workers", "2")
    assert digests(tmp_path) == digests(whole_run)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(pairs, whole_run, tmp_path):
    process = subprocess.Popen(
        command(pairs, tmp_path, "--save-every-n-steps", "1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "run/checkpoints").glob("state-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    train(pairs, tmp_path, "--resume", "latest")
    assert digests(tmp_path) == digests(whole_run)
    times = {"data_time_s", "step_time_s", "samples_per_s", "spectrum"}
    resumed, uninterrupted = (
        [{key: row[key] for key in row.keys() - times} for row in lines(logs)]
        for logs in (tmp_path, whole_run)
    )
    assert resumed == uninterrupted


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(pairs, whole_run, tmp_path):
    process = subprocess.Popen(
        command(pairs, tmp_path, "--workers", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: to every process of the job
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "go on with --resume latest" in output
    train(pairs, tmp_path, "--resume", "latest")
    assert digests(tmp_path) == digests(whole_run)


@pytest.mark.slow
def test_a_damaged_newest_state_names_the_good_one(pairs, tmp_path, capsys):
    train(pairs, tmp_path, "--save-every-n-steps", "1")
    newest = sorted(tmp_path.rglob("state-*"))[-1]
    content = bytearray(newest.read_bytes())
    content[-1000] ^= 1
    newest.write_bytes(content)
    message = refused(capsys, pairs, tmp_path, "--resume", "latest")
    assert "damaged" in message and "--resume" in message
    good = message.rpartition("--resume ")[2]
    train(pairs, tmp_path, "--resume", good)


@pytest.mark.slow
def test_continuing_from_a_checkpoint_starts_from_its_weights(pairs, whole_run, tmp_path):
    start = whole_run / "run/checkpoints/epoch_2.safetensors"
    train(pairs, tmp_path, "--pretrained", str(start), "--lr", "0")
    assert digests(tmp_path)["weights"] == digests(whole_run)["weights"]


@pytest.mark.slow
def test_plain_clip_loss(pairs, tmp_path):
    train(pairs, tmp_path, "--loss", "clip")
    for row in lines(tmp_path):
        assert row["rank"] is None and row["component_loss"] is None
        assert row["loss"] == row["contrastive_loss"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--train-data", "nothing.csv"], ["nothing.csv"]),
        (["--model", "ViT-Z"], ["--model", "ViT-Z", "tiny"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2", "got 1"]),
        (["--batch-size", "100"], ["24", "100"]),
        (["--tau", "1.5"], ["--tau", "1.5"]),
        (["--pretrained", "missing.pt"], ["missing.pt"]),
        (["--resume", "missing.safetensors"], ["--resume", "missing.safetensors"]),
        (["--device", "cuda:99"], ["the device 'cuda:99'"]),
        (["--label-smoothing", "-1"], ["--label-smoothing", "-1"]),
        (["--name", "a/b"], ["--name", "a/b"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--lr", "inf"], ["--lr", "inf"]),
        (["--logs", "/proc/none"], ["/proc/none"]),
        (["--name", "a" * 300], ["File name too long"]),
        (["--beta1", "1"], ["--beta1", "[0, 1)"]),
        (["--threads", "100000"], ["--threads", "100000"]),
        (["--workers", "100000"], ["--workers", "100000"]),
        (["--seed", "9" * 30], ["--seed", "9" * 30]),
        (["--device", "meta"], ["'meta'"]),
        (["--held-out", "24"], ["--held-out", "fewer than 24", "got 24"]),
        (["--held-out", "4", "--val-data", "pairs.csv"], ["--held-out", "--val-data"]),
        (["--train-num-samples", "25"], ["--train-num-samples", "at most 24", "got 25"]),
        (["--val-data", "nothing.csv"], ["nothing.csv", "no such file"]),
        (["--csv-img-key", "photo"], ["'photo'", "filepath"]),
        (["--image-root", "nowhere"], ["nowhere"]),
        (["--cuda-graph-head"], ["--cuda-graph-head: expected", "on a CUDA device, got 'cpu'"]),
        (["--cuda-graph-head", "--loss", "clip"], ["expected --loss himo, got clip"]),
    ],
    ids=lambda value: " ".join(value)[:30] if value[0].startswith("--") else "",
)
def test_bad_flags_are_one_line_and_exit_status_two(flags, words, pairs, tmp_path, capsys):
    message = refused(capsys, pairs, tmp_path, *flags)
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_linked_images_short_captions_and_the_first_pairs(pairs, tmp_path, capsys):
    table = tmp_path / "here" / "pairs.csv"
    table.parent.mkdir()
    (table.parent / "photos").symlink_to(pairs.parent)
    rows = [f"photos/{number}.jpg,{'A word. ' * 200},Short {number}." for number in range(12)]
    table.write_text("\n".join(["filepath,title,caption_short", *rows]) + "\n")
    assert main(["train", "--train-data", str(table), "--logs", str(tmp_path)]) == 2
    assert "is a link that leaves" in capsys.readouterr().err
    out = str(tmp_path / "eval.json")
    assert main(["eval", "--pretrained", "x", "--data", str(table), "--out", out]) == 2
    assert "is a link that leaves" in capsys.readouterr().err
    flags = ["--follow-links", "--short-captions", "--held-out", "2", "--train-num-samples", "9"]
    flags += ["--warmup", "0"]
    done = train(table, tmp_path, *flags, "--epochs", "1")
    assert ": 9 pairs, 1 steps of 8" in done.stdout and "2 pairs to validate on" in done.stdout
    assert "(2 of them share their caption with other images)" in done.stdout
    assert f"{table}: 12 samples (csv)\n" in done.stdout
    assert "longer than context_length" not in done.stderr  # as the long captions are


@pytest.mark.parametrize("warmup", [STEPS - 1, STEPS, 200])
def test_a_warmup_as_long_as_the_run_is_an_error_unless_forced(pairs, tmp_path, capsys, warmup):
    flags = [*small_model(tmp_path), "--warmup", str(warmup)]
    if warmup >= STEPS:
        message = refused(capsys, pairs, tmp_path / "logs", *flags)
        expected = f"--warmup: expected less than the {STEPS} steps of this run, got {warmup}: "
        assert expected in message and "--force-warmup" in message
        assert not (tmp_path / "logs").exists()
        flags.append("--force-warmup")
    assert train_here(pairs, tmp_path / "logs", *flags) == 0


def test_a_rank_that_is_too_small_or_too_large_is_said_with_what_it_means():
    assert [rank_doubt(rank, 128) for rank in (8, 30, 64)] == [None] * 3
    for rank in (1, 7):
        said = rank_doubt(rank, 128)
        assert said.startswith(f"HiDe keeps R = {rank} directions of a batch of 128 texts, below 8")
        assert "sees little of what tells captions apart" in said and "higher --tau" in said
    said = rank_doubt(65, 128)
    assert "above half: components are nearly the captions themselves" in said
    assert "A larger --batch-size or a lower --tau" in said
    assert rank_doubt(8, 16) is None and "above half" in rank_doubt(8, 15)


RANKS = {
    "few": (["--tau", "0.9"], r"step 2: HiDe keeps R = [1-7] .* of 8 texts, below 8: "),
    "after the warm-up": (["--warmup", "5"], r"step 5: HiDe keeps R = [1-7] .* below 8: "),
    "many": (
        ["--batch-size", "24", "--tau", "1"],
        r"step 2: HiDe keeps R = 1[3-6] .* of 24 texts, above half: ",
    ),
    "no component loss": (["--lambda-comp", "0"], None),
    "clip": (["--loss", "clip"], None),
}


@pytest.mark.parametrize(("flags", "said"), RANKS.values(), ids=RANKS)
def test_train_says_once_what_the_rank_means(pairs, tmp_path, capsys, flags, said):
    flags = [*small_model(tmp_path), *flags]
    assert train_here(pairs, tmp_path, "--epochs", "4", *flags) == 0
    noted = re.findall(r"himo: note: (.*R = .*)", capsys.readouterr().err)
    assert len(noted) == (said is not None)
    assert all(re.match(said, note) for note in noted)


NO_DATA = {
    "no row": ("", [], "no sample is left"),
    "no image": ("none.jpg,A card.\n", ["--skip-missing-images"], "1 of 1 images are missing"),
    "all held out": (
        "0.jpg,A card.\n",
        ["--held-out", "1"],
        "--held-out: expected fewer than 1 pairs, got 1",
    ),
    "less than a batch": ("0.jpg,A card.\n", [], "1 samples do not fill one batch of 8"),
}


@pytest.mark.parametrize(("rows", "flags", "said"), NO_DATA.values(), ids=NO_DATA)
def test_no_data_left_is_one_line(pairs, tmp_path, capsys, rows, flags, said):
    table = tmp_path / "pairs.csv"
    table.write_text(f"filepath,title\n{rows}")
    flags = [*flags, "--image-root", str(pairs.parent), *small_model(tmp_path)]
    assert said in refused(capsys, table, tmp_path / "logs", *flags)
    assert not (tmp_path / "logs").exists()


def test_an_unknown_model_is_one_line_with_the_names_before_any_data_is_read(tmp_path, capsys):
    message = refused(capsys, tmp_path / "absent.csv", tmp_path / "logs", "--model", "ViT-B/16")
    assert message.endswith(f"--model: expected one of {', '.join(CONFIGS)}, got ViT-B/16")


@pytest.mark.slow
def test_without_the_extension_train_says_so_once_and_doctor_warns(pairs, tmp_path):
    flags = command(pairs, tmp_path, *small_model(tmp_path), "--epochs", "1")[3:]
    code = f"""
import sys
sys.modules["himo_kernels._C"] = None
from himo.cli import main
print(main({flags!r}), main(["doctor"]))
"""
    environment = {**os.environ, "HIMO_KERNELS_NO_EXTENSION": "0", "HIMO_KERNELS_BACKEND": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.endswith("0 0\n"), done.stdout + done.stderr
    missing = "operators on a CPU run in plain PyTorch: the extension is not built ("
    assert done.stderr.count(missing) == 1 and f"himo: note: {missing}" in done.stderr
    assert "RuntimeWarning" not in done.stderr
    (check,) = re.findall(r"(?m)^warning  extension +(.*)$", done.stdout)
    assert "the extension is not built (" in check and "--force-reinstall SOURCES" in check


@pytest.mark.slow
def test_validation_is_what_himo_eval_finds_and_changes_no_bit(pairs, whole_run, tmp_path, capsys):
    train(pairs, tmp_path, "--val-data", str(pairs), "--val-frequency", "2")
    assert digests(tmp_path) == digests(whole_run)
    *earlier, last = lines(tmp_path)
    assert not any(column in row for row in earlier for column in VALIDATION_COLUMNS)
    out = tmp_path / "eval.json"
    checkpoint = tmp_path / "run/checkpoints/epoch_2.safetensors"
    evaluation = ["eval", "--pretrained", checkpoint, "--data", pairs, "--out", out]
    assert main(list(map(str, evaluation))) == 0
    found = json.loads(out.read_text())["retrieval"]
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert last[f"val_{way}_R@{k}"] == found[way][f"R@{k}"]
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 0
    assert "Retrieval while training" in (tmp_path / "r.html").read_text()


def test_validation_counts_unreadable_images_and_stops_at_its_limit(pairs, generator, tmp_path):
    names = [f"{number}.png" for number in range(6)]
    for name in names:
        Image.new("RGB", (20, 20), 37 * int(name[0])).save(tmp_path / name)
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\n" + "".join(f"{name},A card {name}.\n" for name in names))
    index = open_dataset(table)
    (tmp_path / names[2]).write_bytes(b"no picture")
    torch.manual_seed(0)
    model = HiMoCLIP(CONFIGS["tiny"])
    options = {"batch_size": 4, "workers": 0}
    measured = Validation(index, Preprocess(64), max_bad_fraction=0.2, **options).measure(model)
    (tmp_path / names[2]).unlink()
    table.write_text(table.read_text().replace(f"{names[2]},A card {names[2]}.\n", ""))
    rest = Validation(open_dataset(table), Preprocess(64), max_bad_fraction=0, **options)
    assert measured == rest.measure(model) and measured["val_text_to_image_R@5"] == 100
    (tmp_path / names[3]).unlink()
    limit = r"the limit is 0 % \(--max-bad-fraction\)"
    with pytest.raises(HimoError, match=rf"validation: too many bad samples, {limit}: .*3\.png"):
        rest.measure(model)


def test_an_unknown_flag_value_is_refused_by_the_parser(pairs, tmp_path):
    assert "--loss" in train(pairs, tmp_path, "--loss", "siglip", status=2).stderr


def test_a_second_run_of_one_name_is_refused(pairs, whole_run, capsys):
    assert "already holds a run" in refused(capsys, pairs, whole_run)


def test_resuming_with_another_batch_size_is_refused(pairs, whole_run, capsys):
    message = refused(capsys, pairs, whole_run, "--resume", "latest", "--batch-size", "4")
    assert "expected --batch-size 8 as it began, got 4" in message


def test_a_loss_that_is_not_finite_stops_the_run(pairs, tmp_path):
    done = train(pairs, tmp_path, "--lr", "1e30", "--warmup", "0", status=2)
    assert "is nan" in done.stderr or "is inf" in done.stderr
    assert "step " in done.stderr and not list(tmp_path.rglob("epoch_*"))


@pytest.mark.slow
def test_skipped_steps_end_the_run_where_they_do_not_end(pairs, tmp_path):
    flags = ["--lr", "1e30", "--warmup", "0", "--epochs", "9", "--on-nonfinite", "skip"]
    done = train(pairs, tmp_path, *flags, status=2)
    assert done.stdout.count(": skipped, the gradient is ") == 9
    assert "as in the 9 steps before. A smaller --lr" in done.stderr


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainConfig(train_data="x", lr=2.0, warmup=4)
    rates = [learning_rate(step, 12, settings) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[8] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[3:]))
    assert 0 < rates[-1] < 0.1


def test_norms_biases_and_temperature_are_not_decayed():
    model = HiMoCLIP(CONFIGS["tiny"])
    settings = TrainConfig(train_data="x", lr=1e-6, wd=0.01)
    decayed, plain = make_optimizer(model, settings).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    plain_names = {names[id(p)] for p in plain["params"]}
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0
    assert "logit_scale" in plain_names and "ln_final.weight" in plain_names
    assert all(not n.endswith("bias") and ".ln_" not in n for n in decayed_names)
    frozen = {"positional_embedding"}
    assert decayed_names | plain_names | frozen == set(names.values())


def test_temperature_stays_in_range_under_adversarial_steps(generator):
    # G9: 10,000 optimizer steps of random size and sign.
    model = HiMoCLIP(CONFIGS["tiny"])
    optimizer = torch.optim.SGD([model.logit_scale], lr=1.0)
    for gradient in torch.randn(10_000, generator=generator) * 3:
        model.logit_scale.grad = gradient
        optimizer.step()
        clamp_temperature(model)
        assert 0 <= model.logit_scale <= math.log(100) + 1e-6


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("loss", ["himo", "clip"])
def test_loss_is_finite_at_the_highest_temperature(loss, precision, generator):
    settings = TrainConfig(train_data="x", loss=loss, precision=precision)
    model = HiMoCLIP(CONFIGS["tiny"])
    torch.nn.init.constant_(model.logit_scale, MAX_LOG_SCALE)
    images = torch.randint(0, 255, (6, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens = himo.tokenize([f"a card with number {number}" for number in range(6)])
    outputs = Objective(model, settings)(images, tokens, 12)
    outputs["loss"].backward()
    assert outputs["loss"].dtype == torch.float32 and outputs["loss"].isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_config_refuses_what_is_out_of_range():
    for name, value in {"epochs": 0, "beta1": 1.5, "max_bad_fraction": -0.1, "seed": -1}.items():
        with pytest.raises(HimoError, match=name.replace("_", "-")):
            TrainConfig(train_data="x", **{name: value})
