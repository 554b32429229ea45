"""Writes run directories that look like those of training, the same for the same seed."""

import base64
import io
import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

_COLOURS = {
    "red": "#c8372d", "blue": "#2f6db5", "green": "#3d8f4f", "yellow": "#e0b93a",
    "purple": "#7d4ea3", "orange": "#df7f2e",
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle")
_PLACES = {
    "in the upper left corner": (40, 38), "in the upper right corner": (120, 40),
    "in the middle": (80, 82), "in the lower left corner": (38, 122),
    "in the lower right corner": (122, 120),
}  # fmt: skip


def scene(seed: int) -> tuple[str, list[str]]:
    """A picture as a data URL, and a caption of 4 to 6 sentences that describes it."""
    rng = random.Random(seed)
    count = rng.randint(3, 5)
    image = Image.new("RGB", (160, 160), rng.choice(["#eee8da", "#dfe7ee", "#e6e9df", "#2b3440"]))
    draw = ImageDraw.Draw(image)
    words = {3: "three", 4: "four", 5: "five"}
    sentences = [f"A picture of {words[count]} plain shapes."]
    places = rng.sample(list(_PLACES.items()), count)
    for (place, (x, y)), colour in zip(places, rng.sample(list(_COLOURS), count), strict=True):
        shape, size = rng.choice(_SHAPES), rng.choice([14, 20, 28])
        box = (x - size, y - size, x + size, y + size)
        if shape == "circle":
            draw.ellipse(box, _COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, _COLOURS[colour])
        else:
            draw.polygon([(x, y - size), (x + size, y + size), (x - size, y + size)],
                         _COLOURS[colour])  # fmt: skip
        scale = {14: "small", 20: "medium", 28: "large"}[size]
        sentences.append(f"There is a {scale} {colour} {shape} {place}.")
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    return url, sentences


def config(loss: str, seed: int, **changes: Any) -> dict[str, Any]:
    """config.json, as himo train writes it."""
    return {
        "train_data": "demo/train.json", "dataset_type": "auto", "image_root": "demo/images",
        "workers": 2, "model": "tiny", "pretrained": None, "loss": loss, "preset": "paper",
        "tau": None, "lambda_comp": None, "label_smoothing": None, "gap_eps": 1e-4,
        "batch_size": 128, "epochs": 20, "lr": 5e-4, "wd": 0.01, "warmup": 200,
        "grad_clip_norm": 1.0, "precision": "fp32", "seed": seed, "logs": "logs",
        "name": f"tiny-{loss}", "log_every_n_steps": 10,
        "versions": {"himo": "0.1.0", "torch": "2.13.0"},
        "command": ["himo", "train", "--train-data", "demo/train.json", "--loss", loss],
    } | changes  # fmt: skip


def metrics(loss: str, seed: int, steps: int = 2400, every: int = 10) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: a loss that falls, with the noise of batches."""
    rng = random.Random(f"{loss}-{seed}")
    lines = []
    for step in range(every, steps + 1, every):
        done = step / steps
        contrastive = 0.42 + 4.4 * math.exp(-5.5 * done) + rng.gauss(0, 0.07 + 0.12 * (1 - done))
        component = None
        if loss == "himo":
            contrastive += 0.05
            component = contrastive + 0.32 + 0.3 * math.exp(-3 * done) + rng.gauss(0, 0.06)
        decay = 0.55 + (0.75 if loss == "himo" else 0.5) * done
        spectrum = [(i + 1.0) ** -decay * math.exp(-i / (25 + 60 * done)) for i in range(127)]
        ratios = [value / sum(spectrum) for value in spectrum]
        cumulative = 0.0
        rank = next(i for i, r in enumerate(ratios, 1) if (cumulative := cumulative + r) >= 0.9)
        warm = min(1.0, step / 200)
        data_time = 0.004 + abs(rng.gauss(0, 0.002)) + (0.05 if rng.random() < 0.02 else 0)
        step_time = 0.148 + (0.013 if loss == "himo" else 0) + rng.gauss(0, 0.006) + data_time
        line: dict[str, Any] = {
            "step": step, "epoch": step / 120, "samples": step * 128,
            "loss": contrastive + (component or 0.0), "contrastive_loss": contrastive,
            "component_loss": component, "logit_scale": min(100.0, 14.3 * math.exp(1.6 * done)),
            "lr": 5e-4 * warm * 0.5 * (1 + math.cos(math.pi * done)),
            "grad_norm": math.exp(rng.gauss(1.2 - 2.2 * done, 0.25)) * (12 if step == 740 else 1),
            "rank": max(1, rank + rng.randint(-1, 1)) if loss == "himo" else None,
            "data_time_s": data_time, "step_time_s": step_time, "samples_per_s": 128 / step_time,
        }  # fmt: skip
        if step % 120 == 0:
            for way, best in (("image_to_text", 61), ("text_to_image", 59)):
                line |= {f"val_{way}_R@{k}": best * done**0.5 * k**0.2 for k in (1, 5, 10)}
        if step % 120 < every:
            line["spectrum"] = [round(ratio, 6) for ratio in ratios]
        lines.append(line)
    return lines


def evaluation(loss: str, seed: int, images: int = 500, pictures: int = 6) -> dict[str, Any]:
    """eval.json, as himo eval writes it."""
    rng = random.Random(f"{loss}-{seed}-eval")
    better = 1.0 if loss == "himo" else 0.0
    curves = []
    for number in range(pictures):
        thumbnail, segments = scene(number)
        score = 0.19 + rng.random() * 0.04
        scores = []
        for _ in segments:
            score += 0.022 + 0.006 * better + rng.gauss(0, 0.009 + 0.016 * (1 - better))
            scores.append(score)
        curves.append(
            {"image": f"images/{number:06d}.png", "thumbnail": thumbnail, "segments": segments,
             "scores": scores}
        )  # fmt: skip
    short = images // 12  # captions of fewer than 4 sentences
    misses = []
    for number in range(pictures, 2 * pictures):
        thumbnail, segments = scene(number)
        top = [
            {"name": f"images/{other:06d}.png", "thumbnail": scene(other)[0],
             "right": other == number}
            for other in range(number - 2, number + 3)
        ]  # fmt: skip
        own = {"name": f"images/{number:06d}.png", "thumbnail": thumbnail}
        misses.append({"caption": " ".join(segments), "rank": 3, "image": own, "top": top})
    lengths = [rng.choice([4, 5, 6, 7, 8]) for _ in range(images - short)]
    rhos = [min(1.0, 0.72 + 0.12 * better + 0.02 * k + rng.gauss(0, 0.06)) for k in lengths]
    return {
        "himo_version": "0.1.0",
        "model": {"path": f"logs/tiny-{loss}/checkpoints/epoch_20.safetensors",
                  "sha256": f"{rng.getrandbits(256):064x}", "config": {"embed_dim": 128}},
        "protocol": {"dataset": "demo/held_out.json", "dataset_sha256": "5f" * 32,
                     "images": images, "captions": images, "texts": images, "pairs": images,
                     "shared_captions": 0, "positives": "1 caption per image",
                     "ties": "pessimistic", "precision": "float32",
                     "sentence_rule": r"(?<=[.!?])\s+", "sentence_rule_sha256": "c0" * 32,
                     "texts_cut": 0},
        "retrieval": {
            "image_to_text": {"R@1": 61.2 + better, "R@5": 88.6 + better, "R@10": 95.4 + better},
            "text_to_image": {"R@1": 59.8 + better, "R@5": 87.2 + better, "R@10": 94.0 + better},
            "chance_R@1": 100 / images,
            "ties": {"image_to_text": 0, "text_to_image": 0},
        },
        "himo": {
            "HiMo@2": {"value": 84.6 + 9 * better, "used": images, "left_out": 0},
            "HiMo@3": {"value": 55.6 + 17 * better, "used": images, "left_out": 0},
            "HiMo@K": {"value": sum(rhos) / len(rhos), "used": len(rhos), "left_out": short},
        },
        "coverage": {"used": images, "total": images, "left_out": {}, "examples": []},
        "histogram": {"K": lengths, "rho": rhos, "words": [11 * k + 3 for k in lengths]},
        "misses": misses,
        "curves": curves,
        "chosen": {
            "curves": f"{pictures} of 458 captions of at least 4 parts, drawn at random.",
            "misses": f"{pictures} of {190 + ord(loss[0])} captions, drawn at random.",
        },
    }  # fmt: skip


def write_run(directory: Path, loss: str, seed: int = 0, **options: Any) -> Path:
    """A whole run directory; `options` are those of `metrics`."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(loss, seed), indent=1))
    write_metrics(directory, metrics(loss, seed, **options))
    (directory / "eval.json").write_text(json.dumps(evaluation(loss, seed)))
    return directory


def write_metrics(directory: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)
