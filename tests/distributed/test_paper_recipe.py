"""A tiny model through `--recipe paper-b16` on eight processes: every value of the paper's run."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from step_formula import MEAN, STD, dual_loss, order, rate
from train_processes import TrainProcesses
from train_runs import SMALL

import himo
from himo.model import KEPT_POSITIONS, HiMoCLIP

RANKS, BATCH, EPOCHS, LR = 8, 128, 10, 1e-6  # section 4.1
WARMUP = 5  # the recipe's is 200 steps, in tests/himo/test_recipes.py
HELD_OUT = 1000  # the first pairs of ShareGPT4V, as the released code
PER_EPOCH = 3  # steps
PAIRS = PER_EPOCH * RANKS * BATCH + 5  # five do not fill a step
PICTURES = 64
SECONDS = 600  # eight processes on a machine that may have two cores and other work


def write(folder: Path) -> tuple[Path, Path]:
    """Pairs of 64 pictures with captions of their own, and a model whose scale is above 100."""
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(HELD_OUT + PAIRS):
            words = " ".join(f"w{word}" for word in rng.integers(0, 99, 12))  # over 20 tokens
            record = {"image": f"{number % PICTURES}.png", "caption": f"{words} {number}."}
            file.write(json.dumps(record) + "\n")
    torch.manual_seed(0)
    model = HiMoCLIP(SMALL)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(101))
        for parameter in (model.visual.conv1.weight, model.token_embedding.weight):
            parameter.mul_(10)
    himo.save(model, folder / "small.safetensors")
    return folder / "pairs.jsonl", folder / "small.safetensors"


def first_loss(pairs: Path, model: HiMoCLIP) -> float:
    """Of the first 1,024 pairs, by one process."""
    records = [json.loads(line) for line in pairs.read_text().splitlines()][HELD_OUT:]
    chosen = [records[row] for row in order(PAIRS, 0)[: RANKS * BATCH]]
    images = [np.asarray(Image.open(pairs.with_name(record["image"]))) for record in chosen]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    with torch.no_grad():
        image = model.encode_image((pixels - mean) / std)
        text = model.encode_text(himo.tokenize([record["caption"] for record in chosen]))
        return float(dual_loss(image, text, model.logit_scale.exp(), tau=0.9))


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_eight_processes_killed_and_resumed_once_run_the_recipe(tmp_path):
    pairs, small = write(tmp_path)
    logs = tmp_path / "logs"
    flags = ["train", "--train-data", str(pairs), "--pretrained", str(small), "--logs", str(logs)]
    flags += ["--recipe", "paper-b16", "--held-out", str(HELD_OUT), "--name", "run"]
    flags += ["--warmup", str(WARMUP)]
    flags += ["--workers", "0", "--threads", "1", "--log-every-n-steps", "1"]
    flags += ["--save-every-n-steps", "2", "--rank-timeout", "300"]
    ranks = TrainProcesses(RANKS, logs, flags)
    ranks.wait_for("run/checkpoints/state-*14.safetensors", SECONDS)
    os.kill(ranks.process_of(5), signal.SIGKILL)
    output = ranks.end(None, SECONDS)
    assert "rank 5 (process " in output and "ended without a word" in output
    output = TrainProcesses(RANKS, logs, [*flags, "--resume", "latest"]).end(0, SECONDS)

    steps = PER_EPOCH * EPOCHS
    assert f"{PAIRS} pairs, {steps} steps of {RANKS * BATCH}, himo loss" in output
    assert "8 processes" in output and "goes on after step 1" in output
    config = json.loads((logs / "run/config.json").read_text())
    expected = {"batch_size": BATCH, "accum_freq": 1, "epochs": EPOCHS, "lr": LR, "wd": 1e-2}
    expected |= {"warmup": WARMUP, "beta1": 0.9, "beta2": 0.999, "preset": "paper"}
    expected |= {"clamp_scale": True, "decay_all": False, "same_order": False}
    assert {name: config[name] for name in expected} == expected

    rows = [json.loads(line) for line in (logs / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    rates = [rate(n, steps, LR, WARMUP) for n in range(steps)]
    # NumPy's cosine and Python's may differ in the last bit, of which little is left near the end.
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-13, abs=0)
    before, _ = himo.load(small)
    assert rows[0]["loss"] == pytest.approx(first_loss(pairs, before), rel=2e-6)
    assert all(row["logit_scale"] <= 100 * (1 + 1e-6) for row in rows)  # 101 in the checkpoint
    assert rows[0]["logit_scale"] == pytest.approx(100, rel=1e-6)
    validated = [row["step"] for row in rows if "val_text_to_image_R@1" in row]
    assert validated == [PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]

    after, _ = himo.load(logs / f"run/checkpoints/epoch_{EPOCHS}.safetensors")
    old, new = before.state_dict(), after.state_dict()
    for name in ("positional_embedding", "positional_embedding_res"):  # a file has one table twice
        assert torch.equal(old[name][:KEPT_POSITIONS], new[name][:KEPT_POSITIONS])  # frozen
    moved = {name for name, value in new.items() if not torch.equal(value, old[name])}
    trained = {name for name, parameter in after.named_parameters() if parameter.requires_grad}
    assert moved == trained | {"positional_embedding"}
