"""eval.json and the table on the terminal."""

import base64
import io
import json
import os
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from himo.evaluate.captions import CaptionScores
from himo.evaluate.encode import Images
from himo.evaluate.himo_k import GIVEN_K_RULE, PrefixScores, himo_k, word_counts
from himo.evaluate.metrics import MAX_SEGMENTS, caption_segments
from himo.evaluate.retrieval import RECALLS
from himo.files import write_text
from himo.transforms import open_image

_CURVES = 6  # images with their growth of similarity in the result
_MISSES = 6  # captions in the result with another image that fits better
_TOP = 5  # images that fit such a caption best
_THUMBNAIL = 160  # pixels of the longer side


def caption_curves(scores: CaptionScores) -> tuple[list[dict[str, Any]], str]:
    """Growth curves of a fixed choice of captions, and a sentence on how they were chosen."""
    captions, index = scores.captions, scores.index
    positions, how = _choice(scores.series, "captions")
    return [
        {
            "image": index[captions.caption_rows[chosen]].image,
            "thumbnail": thumbnail(index, captions.image_rows[captions.caption_images[chosen]]),
            "segments": caption_segments(captions.captions[chosen]),
            "scores": scores.series[chosen].tolist(),
        }
        for chosen in positions
    ], how


def prefix_curves(scores: PrefixScores) -> tuple[list[dict[str, Any]], str]:
    """Growth curves of a fixed choice of lines of HiMo-Docci, and how they were chosen."""
    positions, how = _choice(scores.series, "lines of HiMo-Docci")
    return [
        {
            "image": scores.records[chosen].image,
            "thumbnail": thumbnail(scores.images, scores.rows[chosen]),
            "segments": scores.records[chosen].segments(),
            "scores": scores.series[chosen].tolist(),
        }
        for chosen in positions
    ], how


def caption_misses(scores: CaptionScores) -> tuple[list[dict[str, Any]], str]:
    """Some captions whose image is not ranked first, each with the images that fit it best.

    Returns:
        The captions, and a sentence on how they were chosen.
    """
    captions, ranks = scores.captions, scores.sections["ranks"]["text_to_image"]
    first: dict[int, int] = {}  # the first caption of a text
    right: dict[int, list[int]] = {}  # the images of a text
    for caption, text in enumerate(scores.texts):
        first.setdefault(text, caption)
        right.setdefault(text, []).append(captions.caption_images[caption])
    missed = [text for text, rank in enumerate(ranks) if rank > 1]
    chosen = sorted(random.Random(0).sample(missed, min(_MISSES, len(missed))))
    shown = [first[text] for text in chosen]
    similarity = scores.text_features[shown] @ scores.image_features.t()
    nearest = similarity.topk(min(_TOP, similarity.shape[1]), dim=1).indices.tolist()

    def picture(image: int) -> dict[str, Any]:
        row = captions.image_rows[image]
        return {"name": scores.index[row].image, "thumbnail": thumbnail(scores.index, row)}

    return [
        {
            "caption": captions.captions[caption],
            "rank": ranks[text],
            "image": picture(captions.caption_images[caption]),
            "top": [picture(other) | {"right": other in right[text]} for other in top],
        }
        for text, caption, top in zip(chosen, shown, nearest, strict=True)
    ], _drawn(len(chosen), len(missed), "captions that were missed")


def add_himo_docci(
    result: dict[str, Any], path: str | os.PathLike[str], scores: PrefixScores
) -> None:
    """Adds HiMo@K of HiMo-Docci: as HiMo@K where it is the only data set, else next to it."""
    # Its prefixes are given: none is left out for being short, and eq. (5) is used for every K.
    measure = himo_k(scores.series, more_than=1)
    measure["left_out"] = scores.coverage.total - measure["used"]
    histogram = {key: measure.pop(key) for key in ("K", "rho")}
    whole = [record.prefixes[-1] for record in scores.records]
    histogram["words"] = word_counts(whole, scores.series, more_than=1)
    coverage = scores.coverage.to_dict()
    if "protocol" in result:
        measure |= {"dataset": os.fspath(path), "k_rule": GIVEN_K_RULE, "coverage": coverage}
        measure["texts_cut"] = scores.cut
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
        "k_rule": GIVEN_K_RULE,
        "texts_cut": scores.cut,
    }
    result |= {"himo": {"HiMo@K": measure}, "coverage": coverage, "histogram": histogram}


def thumbnail(images: Images, row: int) -> str:
    """The image as the data URL of a JPEG of at most 160 pixels a side."""
    return data_url(open_image(images.image_source(row)).convert("RGB"), _THUMBNAIL, 80)


def data_url(image: Image.Image, side: int, quality: int) -> str:
    """An RGB image, which this makes smaller in place, as the data URL of a JPEG.

    Args:
        side: pixels of the longer side, at most.
        quality: of the JPEG, up to 95.
    """
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
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
    protocol, himo, cola = (result.get(name, {}) for name in ("protocol", "himo", "cola"))
    lines: list[str] = []
    if retrieval := result.get("retrieval"):
        ties = retrieval["ties"]
        lines += [*_size(protocol), "", _row("retrieval, %", [f"R@{k}" for k in RECALLS])]
        for way in ties:
            recalls = [f"{retrieval[way][f'R@{k}']:.2f}" for k in RECALLS]
            lines.append(_row(way.replace("_", " "), recalls))
        lines.append(_row("chance", [f"{retrieval['chance_R@1']:.2f}", "", ""]))
        if any(ties.values()):
            counts = [f"{count:,} {way.replace('_', ' ')}" for way, count in ties.items()]
            lines.append(f"ties, which count against the model: {', '.join(counts)}")
    if himo:
        lines += ["", _row("growth of similarity", ["value", "used", "left out"])]
    for name, measure in himo.items():
        unit, decimals = ("%", 2) if name in ("HiMo@2", "HiMo@3") else ("correlation", 3)
        value = measure["value"]
        text = "none" if value is None else f"{value:.{decimals}f}"
        lines.append(_row(f"{name}, {unit}", [text, *_counts(measure)]))
    if cola:
        lines += ["", _row("two images, two captions", ["value", "used", "left out"])]
        lines.append(_row("COLA, %", [f"{cola['accuracy']:.2f}", *_counts(cola)]))
    if coverage := result.get("coverage"):
        lines += ["", f"used {coverage['used']:,} of {coverage['total']:,} records"]
        lines += [f"  left out: {n:,} {why}" for why, n in coverage["left_out"].items()]
        lines += [f"  first: {example}" for example in coverage["examples"][:1]]
    parts = {"": protocol, " of HiMo-Docci": himo.get("HiMo-Docci", {}), " of COLA": cola}
    for of_what, part in parts.items():
        if part.get("texts_cut"):
            context = result["model"]["config"]["context_length"]
            lines.append(f"{part['texts_cut']:,} texts{of_what} were cut after {context} tokens")
    if joined := protocol.get("captions_segmented"):
        lines.append(f"{joined:,} captions of over {MAX_SEGMENTS} sentences: in as many segments")
    return "\n".join(lines)


def _counts(measure: dict[str, Any]) -> list[str]:
    return [f"{measure[key]:,}" for key in ("used", "left_out")]


def _size(protocol: dict[str, Any]) -> list[str]:
    """How many images and captions there are, and how many captions repeat a text."""
    lines = [f"{protocol['images']:,} images, {protocol['captions']:,} captions"]
    if protocol["texts"] < protocol["captions"]:
        lines[0] += f" of {protocol['texts']:,} distinct texts"
    if protocol["shared_captions"]:
        shared = f"{protocol['shared_captions']:,} captions are those of several images"
        lines.append(f"{shared}, each of which is right")
    return lines


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<34}" + "".join(f"{cell:>10}" for cell in cells).rstrip()


def _choice(series: Sequence[Tensor], what: str) -> tuple[list[int], str]:
    """Up to 6 positions, the same for the same data, and a sentence on how they were chosen.

    A curve needs at least 4 points, or 2 if no series has 4.
    """
    for least in (4, 2):
        eligible = [position for position, scores in enumerate(series) if len(scores) >= least]
        if eligible:
            chosen = sorted(random.Random(0).sample(eligible, min(_CURVES, len(eligible))))
            return chosen, _drawn(len(chosen), len(eligible), f"{what} of at least {least} parts")
    return [], ""


def _drawn(count: int, among: int, what: str) -> str:
    return f"{count} of {among:,} {what}, drawn at random with a fixed seed."
