"""A captioned set, a tiny checkpoint and `himo eval` on them, for the tests of the evaluation."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from himo.checkpoint import load, save
from himo.cli import main
from himo.model import CLIPConfig, HiMoCLIP
from himo.tokenizer import tokenize
from himo.transforms import open_image

CONFIG = CLIPConfig(
    embed_dim=16,
    image_resolution=32,
    vision_layers=1,
    vision_width=32,
    vision_patch_size=16,
    context_length=248,
    vocab_size=49408,
    text_width=16,
    text_layers=1,
)
COLOURS = ("red", "green", "blue", "black", "white", "orange", "pink", "grey")
IMAGES = 14


def write_checkpoint(path: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HiMoCLIP(CONFIG)
    save(model, path)
    return path


def write_captions(directory: Path) -> Path:
    """captions.csv: IMAGES images, 0.png and on, with captions of 1 to 7 sentences."""
    draw = random.Random(7)
    rows = ["filepath\ttitle"]
    for number in range(IMAGES):
        image = Image.frombytes("RGB", (12, 12), draw.randbytes(12 * 12 * 3))
        image.resize((40 + number, 36)).save(directory / f"{number}.png")
        sentences = [f"A {draw.choice(COLOURS)} dot {draw.random():.4f}."] + [
            f"Then a {draw.choice(COLOURS)} one." for _ in range(number % 7)
        ]
        rows.append(f"{number}.png\t{' '.join(sentences)}")
    path = directory / "captions.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def write_prefixes(captions: Path) -> Path:
    """prefixes.jsonl, like HiMo-Docci's file: 2 to 5 prefixes for each image of `captions`."""
    lines = []
    for number in range(IMAGES):
        words = [f"A {COLOURS[number % 8]} thing,", "seen here,", "and more.", "Much.", "Last."]
        texts = [" ".join(words[:end]) for end in range(1, 3 + number % 4)]
        lines.append({"img_path": f"{number}.png", "caption": texts, "raw_caption": texts[-1]})
    path = captions.parent / "prefixes.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Outcome(NamedTuple):
    status: int
    result: dict[str, Any] | None
    out: str
    err: str


class Command:
    """`himo eval` with a checkpoint, the result in `directory`."""

    def __init__(
        self, checkpoint: Path, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.checkpoint, self.out, self.capsys = checkpoint, directory / "eval.json", capsys

    def __call__(self, *options: object) -> Outcome:
        self.out.unlink(missing_ok=True)
        given = ["eval", "--pretrained", self.checkpoint, "--device", "cpu", "--out", self.out]
        status = main([str(argument) for argument in (*given, *options)])
        printed = self.capsys.readouterr()
        assert not list(self.out.parent.glob(".himo-*"))  # nothing half-written
        result = json.loads(self.out.read_text()) if self.out.exists() else None
        return Outcome(status, result, printed.out, printed.err)


def expected_scores(checkpoint: Path, paths: Iterable[Path], texts: Sequence[str]) -> Tensor:
    """Cosine similarities [images, texts], each image and text encoded alone."""
    model, preprocess = load(checkpoint)
    with torch.no_grad():
        images = [model.encode_image(preprocess(open_image(path))[None]) for path in paths]
        encoded = [model.encode_text(tokenize(text)) for text in texts]
    return F.normalize(torch.cat(images), dim=1) @ F.normalize(torch.cat(encoded), dim=1).t()
