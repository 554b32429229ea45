"""Small data sets on disk, in every format, for the tests of himo.data."""

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from himo.data.records import BadRecord, Record, Source

SHAREGPT_PROMPT = {"from": "human", "value": "What is in the picture?\n<image>"}


def image_bytes(number: int = 0, side: int = 12) -> bytes:
    buffer = io.BytesIO()
    colour = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, count: int) -> list[str]:
    """Writes `images/<n>.png`; their paths relative to `folder`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{number:03}.png" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(image_bytes(number))
    return names


def sharegpt4v_record(image: object, caption: object) -> dict[str, object]:
    return {
        "id": "0",
        "image": image,
        "conversations": [SHAREGPT_PROMPT, {"from": "gpt", "value": caption}],
    }


def write_jsonl(path: Path, rows: Sequence[tuple[object, object]]) -> Path:
    text = "".join(json.dumps({"image": image, "caption": text}) + "\n" for image, text in rows)
    path.write_text(text, encoding="utf-8")
    return path


def write_sharegpt4v(path: Path, rows: Sequence[tuple[object, object]]) -> Path:
    records = [sharegpt4v_record(image, caption) for image, caption in rows]
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def write_coco(path: Path, rows: Sequence[tuple[object, object]]) -> Path:
    """As COCO's captions_val2017.json; rows of one image belong together. Ids are not in order."""
    ids = {name: 1000 - number for number, name in enumerate(dict.fromkeys(x for x, _ in rows))}
    value = {
        "info": {"description": "COCO 2017 Dataset"},
        "licenses": [{"id": 1}],
        "images": [{"license": 1, "file_name": name, "id": ids[name]} for name in ids],
        "annotations": [
            {"image_id": ids[name], "id": number, "caption": caption}
            for number, (name, caption) in enumerate(rows)
        ],
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_karpathy(
    path: Path, rows: Sequence[tuple[str, object]], splits: Sequence[str] = (), folder: str = ""
) -> Path:
    """As dataset_coco.json, with a folder, or dataset_flickr30k.json; splits by image, or test."""
    names = list(dict.fromkeys(name for name, _ in rows))
    images = []
    for number, name in enumerate(names):
        sentences = [{"tokens": [], "raw": text, "imgid": number} for x, text in rows if x == name]
        image = {"filename": name, "imgid": number, "sentences": sentences}
        image["split"] = splits[number] if splits else "test"
        images.append(image | ({"filepath": folder} if folder else {}))
    value = {"images": images, "dataset": "coco" if folder else "flickr30k"}
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_flickr(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    """As Flickr30k's results_20130124.token."""
    counts: dict[str, int] = {}
    text = ""
    for name, caption in rows:
        text += f"{name}#{counts.setdefault(name, 0)}\t{caption}\n"
        counts[name] += 1
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: Sequence[tuple[str, str]], separator: str = "\t") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([("filepath", "title"), *rows])
    return path


def write_tar(
    path: Path, files: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(source: Source) -> tuple[list[Record], list[BadRecord]]:
    """The good and the bad records of a source."""
    items = list(source.read(lambda done: None))
    good = [item for item in items if isinstance(item, Record)]
    return good, [item for item in items if isinstance(item, BadRecord)]
