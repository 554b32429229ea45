"""Runs of `himo train` on 256 small pictures, in one process and in several, and their results."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from launch import ROOT, environment
from PIL import Image
from torch import Tensor
from train_processes import TrainProcesses

import himo
from himo_kernels.testing import relative_error

FLAGS = ["--model", "tiny", "--lr", "1e-4", "--warmup", "2", "--workers", "0"]
FLAGS += ["--log-every-n-steps", "1", "--threads", "1", "--name", "run"]


def cards(folder: Path) -> Path:
    """Makes 256 photos of noise in one colour, and a csv of what each shows; returns the csv."""
    rng = np.random.default_rng(0)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for number in range(256):
            colour = rng.integers(0, 255, 3)
            pixels = (colour + rng.integers(0, 60, (24, 24, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", f"A card of red {colour[0]} and blue {colour[2]}."])
    return folder / "pairs.csv"


def arguments(pairs: Path, logs: Path, *flags: str) -> list[str]:
    return ["train", "--train-data", str(pairs), "--logs", str(logs), *FLAGS, *flags]


def alone(pairs: Path, logs: Path, *flags: str) -> Path:
    run = [sys.executable, "-m", "himo", *arguments(pairs, logs, *flags)]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return logs


class Ranks(TrainProcesses):
    """`himo train` with the flags of this file."""

    def __init__(
        self, world: int, pairs: Path, logs: Path, *flags: str, launch: tuple[str, ...] = ()
    ) -> None:
        super().__init__(world, logs, arguments(pairs, logs, *flags), launch)


def weights(logs: Path, epoch: int) -> dict[str, Tensor]:
    model, _ = himo.load(logs / f"run/checkpoints/epoch_{epoch}.safetensors")
    return model.state_dict()


def assert_equal_weights(logs: Path, expected: Path, epoch: int) -> None:
    assert_close(weights(logs, epoch), weights(expected, epoch))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To a relative error of 1e-5 of each tensor."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        pair = actual[name], tensor
        if "attn.in_proj_bias" in name and tensor.dim():
            # Attention does not depend on the biases of its keys. Their gradients are pure
            # rounding, which Adam turns into full-length steps.
            query, _, value = zip(*(bias.chunk(3) for bias in pair), strict=True)
            pair = torch.cat([query[0], value[0]]), torch.cat([query[1], value[1]])
        assert relative_error(*pair) <= 1e-5, name


def rows(logs: Path) -> list[dict]:
    return [json.loads(line) for line in (logs / "run/metrics.jsonl").open()]


def losses(logs: Path) -> list[float]:
    return [row["loss"] for row in rows(logs)]
