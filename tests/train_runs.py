"""Runs `himo train` on a small folder of photos, and reads its output."""

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import himo
from himo.cli import main
from himo.model import CLIPConfig, HiMoCLIP

ROOT = Path(__file__).parents[1]
FLAGS = ["--model", "tiny", "--batch-size", "8", "--epochs", "2", "--lr", "1e-3", "--warmup", "2"]
FLAGS += ["--workers", "0", "--threads", "1", "--log-every-n-steps", "1"]

SMALL = CLIPConfig(
    embed_dim=16,
    image_resolution=32,
    vision_layers=1,
    vision_width=16,
    vision_patch_size=16,
    context_length=248,
    vocab_size=49408,
    text_width=16,
    text_layers=1,
)


def photos(folder: Path) -> Path:
    """Makes a user's own folder, 24 JPEG files and a csv; returns the csv."""
    rng = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for number in range(24):
            colour = rng.integers(0, 255, 3)
            pixels = np.tile(colour.astype(np.uint8), (48, 80, 1))
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
            writer.writerow(
                [f"{number}.jpg", f"A plain card. Its red is {colour[0]}. Number {number}."]
            )
    return folder / "pairs.csv"


def small_model(folder: Path) -> list[str]:
    """Makes a model of 0.8 million parameters; returns the flags to train it."""
    path = folder / "small.safetensors"
    torch.manual_seed(0)
    himo.save(HiMoCLIP(SMALL), path)
    return ["--pretrained", str(path)]


def command(pairs: Path, logs: Path, *flags: str) -> list[str]:
    start = [sys.executable, "-m", "himo", "train", "--train-data", str(pairs)]
    return [*start, "--logs", str(logs), "--name", "run", *FLAGS, *flags]


def train(pairs: Path, logs: Path, *flags: str, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(pairs, logs, *flags), capture_output=True, text=True, cwd=ROOT, timeout=240
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def train_here(pairs: Path, logs: Path, *flags: str) -> int:
    """The exit status of a run in this process."""
    # Without --threads, which would limit it to one.
    given = " ".join(command(pairs, logs)[3:]).replace(" --threads 1", "").split()
    return main([*given, *flags])


def refused(capsys, pairs: Path, logs: Path, *flags: str) -> str:
    """The one-line error for flags that are refused, from a run in this process."""
    assert train_here(pairs, logs, *flags) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("himo: error: ") and "\n" not in message
    return message


def lines(logs: Path) -> list[dict]:
    return [json.loads(line) for line in (logs / "run/metrics.jsonl").read_text().splitlines()]


def digests(logs: Path) -> dict[str, str]:
    """SHA-256 of the model and of the last training state, without settings of paths."""
    checkpoints = logs / "run/checkpoints"
    model, _ = himo.load(checkpoints / "epoch_2.safetensors")
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.numpy().tobytes())
    return {"weights": weights.hexdigest(), "states": sorted(checkpoints.glob("state-*"))[-1].name}
