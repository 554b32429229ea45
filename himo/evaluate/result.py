"""eval.json and the table on the terminal."""

import base64
import io
import json
import os
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from himo.evaluate.captions import CaptionScores
from himo.evaluate.encode import Images
from himo.evaluate.himo_k import PrefixScores, himo_k
from himo.evaluate.metrics import MAX_SEGMENTS, caption_segments
from himo.evaluate.retrieval import RECALLS
from himo.files import write_text
from himo.transforms import open_image

_CURVES = 6  # images whose growth of similarity is in the result
_MISSES = 6  # captions that are in it with another image that fits better
_THUMBNAIL = 160  # pixels of the longer side


def caption_curves(scores: CaptionScores) -> list[dict[str, Any]]:
    """Growth curves of a fixed choice of captions, those of more than 3 sentences first."""
    captions = scores.captions
    return [
        _curve(
            scores.index,
            captions.image_rows[captions.caption_images[chosen]],
            scores.index[captions.caption_rows[chosen]].image,
            caption_segments(captions.captions[chosen]),
            scores.series[chosen],
        )
        for chosen in _choice(scores.series)
    ]


def prefix_curves(scores: PrefixScores) -> list[dict[str, Any]]:
    """Growth curves of a fixed choice of lines of HiMo-Docci."""
    return [
        _curve(
            scores.images,
            scores.rows[chosen],
            scores.records[chosen].image,
            scores.records[chosen].segments(),
            scores.series[chosen],
        )
        for chosen in _choice(scores.series)
    ]


def caption_misses(scores: CaptionScores) -> list[dict[str, Any]]:
    """A fixed choice of captions whose image is not ranked first, and the nearest other image."""
    captions, ranks = scores.captions, scores.sections["ranks"]["text_to_image"]
    first: dict[int, int] = {}  # the caption that stands for a text
    right: dict[int, list[int]] = {}  # the images of a text
    for caption, text in enumerate(captions.texts()):
        first.setdefault(text, caption)
        right.setdefault(text, []).append(captions.caption_images[caption])
    missed = [text for text, rank in enumerate(ranks) if rank > 1]
    chosen = sorted(random.Random(0).sample(missed, min(_MISSES, len(missed))))
    shown = [first[text] for text in chosen]
    similarity = scores.text_features[shown] @ scores.image_features.t()
    for row, text in zip(similarity, chosen, strict=True):
        row[right[text]] = -torch.inf
    nearest = similarity.argmax(dim=1).tolist() if chosen else []

    def picture(image: int) -> dict[str, Any]:
        row = captions.image_rows[image]
        return {"name": scores.index[row].image, "thumbnail": thumbnail(scores.index, row)}

    return [
        {
            "caption": captions.captions[caption],
            "rank": ranks[text],
            "image": picture(captions.caption_images[caption]),
            "first": picture(other),
        }
        for text, caption, other in zip(chosen, shown, nearest, strict=True)
    ]


def add_himo_docci(
    result: dict[str, Any], path: str | os.PathLike[str], scores: PrefixScores
) -> None:
    """Adds HiMo@K of HiMo-Docci: as HiMo@K where it is the only data set, else beside that."""
    # The prefixes are given, so none is left out for being short: all K go through eq. (5).
    measure = himo_k(scores.series, more_than=1)
    measure["left_out"] = scores.coverage.total - measure["used"]
    histogram = {"K": measure.pop("K"), "rho": measure.pop("rho")}
    coverage = scores.coverage.to_dict()
    if "protocol" in result:
        measure |= {"dataset": os.fspath(path), "coverage": coverage, "texts_cut": scores.cut}
        result["himo"]["HiMo-Docci"] = measure
        return
    result["protocol"] = {
        "dataset": os.fspath(path),
        "dataset_type": "himo-docci",
        "images": len(scores.records),
        "captions": sum(len(record.prefixes) for record in scores.records),
        "positives": None,
        "ties": "pessimistic",
        "precision": "float32",
        "k_rule": "K = prefixes of the image",
        "texts_cut": scores.cut,
    }
    result["himo"] = {"HiMo@K": measure}
    result["coverage"] = coverage
    result["histogram"] = histogram


def thumbnail(images: Images, row: int) -> str:
    """The image as the data URL of a JPEG of at most 160 pixels a side."""
    image = open_image(images.image_source(row)).convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def write_result(path: str | os.PathLike[str], result: dict[str, Any]) -> None:
    """Writes eval.json, whole or not at all: one line for each section.

    Raises:
        HimoError: as `himo.files.atomic_path`.
    """
    sections = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in result.items()]
    write_text(path, "{\n" + ",\n".join(sections) + "\n}\n")


def table(result: dict[str, Any]) -> str:
    """The measures for a terminal, at most 80 columns wide."""
    lines: list[str] = []
    protocol = result.get("protocol", {})
    for way in ("image_to_text", "text_to_image"):
        if way not in result.get("retrieval", {}):
            continue
        if not lines:
            lines += [*_size(protocol), "", _row("retrieval, %", [f"R@{k}" for k in RECALLS])]
        values = result["retrieval"][way]
        lines.append(_row(way.replace("_", " "), [f"{values[f'R@{k}']:.2f}" for k in RECALLS]))
    if lines:
        lines.append(_row("chance", [f"{result['retrieval']['chance_R@1']:.2f}", "", ""]))
        ties = result["retrieval"]["ties"]
        if any(ties.values()):
            counts = [f"{ties[way]:,} {way.replace('_', ' ')}" for way in ties]
            lines.append(f"ties, which count against the model: {', '.join(counts)}")
    measures = list(result.get("himo", {}).items())
    if measures:
        lines += ["", _row("growth of similarity", ["value", "used", "left out"])]
    for name, measure in measures:
        is_percent = name in ("HiMo@2", "HiMo@3")
        value = measure["value"]
        text = "none" if value is None else f"{value:.2f}" if is_percent else f"{value:.3f}"
        unit = "%" if is_percent else "correlation"
        counts = [f"{measure[key]:,}" for key in ("used", "left_out")]
        lines.append(_row(f"{name}, {unit}", [text, *counts]))
    if "cola" in result:
        groups = result["cola"]
        counts = [f"{groups[key]:,}" for key in ("used", "left_out")]
        lines += ["", _row("two images, two captions", ["value", "used", "left out"])]
        lines.append(_row("COLA, %", [f"{groups['accuracy']:.2f}", *counts]))
    coverage = result.get("coverage")
    if coverage is not None:
        lines += ["", f"used {coverage['used']:,} of {coverage['total']:,} records"]
        lines += [f"  left out: {n:,} {why}" for why, n in coverage["left_out"].items()]
        lines += [f"  first: {example}" for example in coverage["examples"][:1]]
    parts = {"": protocol, " of HiMo-Docci": result.get("himo", {}).get("HiMo-Docci", {})}
    for of_what, part in (parts | {" of COLA": result.get("cola", {})}).items():
        if part.get("texts_cut"):
            context = result["model"]["config"]["context_length"]
            lines.append(f"{part['texts_cut']:,} texts{of_what} were cut after {context} tokens")
    if joined := protocol.get("captions_segmented"):
        lines.append(f"{joined:,} captions of over {MAX_SEGMENTS} sentences: in as many segments")
    return "\n".join(lines)


def _size(protocol: dict[str, Any]) -> list[str]:
    """How many images and captions there are, and how many captions are no text of their own."""
    lines = [f"{protocol['images']:,} images, {protocol['captions']:,} captions"]
    if protocol["texts"] < protocol["captions"]:
        lines[0] += f" of {protocol['texts']:,} distinct texts"
    if protocol["shared_captions"]:
        shared = f"{protocol['shared_captions']:,} captions are those of several images"
        lines.append(f"{shared}, each of which is right")
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells).rstrip()


def _choice(series: Sequence[Tensor]) -> list[int]:
    """Up to 6 positions, the same for the same data: a curve needs more than 3 points, or 2."""
    for least in (4, 2):
        eligible = [position for position, scores in enumerate(series) if len(scores) >= least]
        if eligible:
            return sorted(random.Random(0).sample(eligible, min(_CURVES, len(eligible))))
    return []


def _curve(
    images: Images, row: int, name: str, segments: list[str], scores: Tensor
) -> dict[str, Any]:
    return {
        "image": name,
        "thumbnail": thumbnail(images, row),
        "segments": segments,
        "scores": scores.tolist(),
    }
