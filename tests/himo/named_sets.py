"""Small sets in the layouts of the named ones, for the tests of `himo eval --suite`."""

import json
import random
from pathlib import Path

from captioned_files import write_coco, write_csv, write_flickr, write_karpathy
from PIL import Image

WORDS = ("red", "green", "blue", "door", "tree", "car", "tall", "round", "old", "stone")
SIZE = 8  # images of a set


def write_images(folder: Path, names: list[str], seed: int) -> None:
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture = Image.frombytes("RGB", (6, 5), draw.randbytes(90))
        picture.resize((40, 34)).save(folder / name)


def captions(count: int, seed: int, sentences: int = 5) -> list[str]:
    """Different captions of 1 to `sentences` sentences."""
    draw = random.Random(seed)
    return [
        " ".join(
            f"A {draw.choice(WORDS)} {draw.choice(WORDS)} {draw.randint(0, 999)} is here."
            for _ in range(1 + number % sentences)
        )
        for number in range(count)
    ]


def write_urban1k(root: Path) -> None:
    write_images(root / "image", [f"{n}.jpg" for n in range(SIZE)], 1)
    (root / "caption").mkdir()
    for number, text in enumerate(captions(SIZE, 1)):
        (root / "caption" / f"{number}.txt").write_text(f"{text}\nA second line.\n")


def write_docci(root: Path) -> None:
    """The file of all splits: images of others than the test split are not there."""
    names = [f"test_{n:05}.jpg" for n in range(SIZE)]
    write_images(root / "images", names, 2)
    rows = [
        {
            "example_id": name[:-4],
            "split": name.split("_")[0],
            "image_file": name,
            "description": f" {text} ",
        }
        for name, text in zip(["train_00000.jpg", *names], captions(SIZE + 1, 2), strict=True)
    ]
    path = root / "docci_descriptions.jsonlines"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_himo_docci(root: Path) -> None:
    """In the folder of DOCCI's images, as the released script has it."""
    rows = []
    for number in range(SIZE):
        words = captions(1, 100 + number, 1)[0].split()
        texts = [" ".join(words[:end]) for end in range(2, 4 + number % 4)]
        row = {"img_path": f"test_{number:05}.jpg", "caption": texts, "raw_caption": texts[-1]}
        rows.append(json.dumps(row) + "\n")
    (root / "himo_docci_data.json").write_text("".join(rows))


def write_long_dci(root: Path) -> None:
    """dci_long.csv with the images in a folder next to its own, as the released script has them."""
    names = [f"sa_{n}.jpg" for n in range(SIZE)]
    write_images(root.parent / "SA1B", names, 3)
    root.mkdir()
    write_csv(root / "dci_long.csv", list(zip(names, captions(SIZE, 3), strict=True)))


def _five_each(names: list[str], seed: int, more: int = 0) -> list[tuple[str, str]]:
    each = 5 + more
    texts = captions(each * len(names), seed, 2)
    return [(names[at // each], text) for at, text in enumerate(texts)]


def write_flickr30k(root: Path) -> None:
    """dataset_flickr30k.json, with an image of another split, and the lines of the test split."""
    names = [f"{n}.jpg" for n in range(SIZE + 1)]
    write_images(root / "flickr30k-images", names, 4)
    rows = _five_each(names, 4)
    write_karpathy(root / "dataset_flickr30k.json", rows, ["test"] * SIZE + ["train"])
    write_flickr(root / "test_1k.txt", rows[: 5 * SIZE])


def write_coco_sets(root: Path) -> None:
    """val2017 with six captions each, of which five count, and Karpathy's file."""
    names = [f"{n:012}.jpg" for n in range(SIZE)]
    write_images(root / "val2017", names, 5)
    (root / "annotations").mkdir()
    write_coco(root / "annotations" / "captions_val2017.json", _five_each(names, 5, 1))
    names = [f"COCO_val2014_{n:012}.jpg" for n in range(SIZE)]
    write_images(root / "val2014", names, 6)
    write_karpathy(root / "dataset_coco.json", _five_each(names, 6), folder="val2014")


def write_cola(root: Path) -> None:
    write_images(root / "vg_gqa_images", [f"{n}.jpg" for n in range(SIZE)], 7)
    url, texts = "https://cs-people.bu.edu/array/data/vg_gqa_images/{}.jpg", captions(SIZE, 7, 1)
    pairs = [(a, b) for a in range(SIZE) for b in range(SIZE) if a < b]
    groups = [[url.format(a), texts[a], url.format(b), texts[b]] for a, b in pairs]
    (root / "data").mkdir()
    (root / "data" / "COLA_multiobjects_matching_benchmark.json").write_text(json.dumps(groups))


def write_all(root: Path) -> Path:
    """Every named set, below `root`."""
    write_urban1k(root / "Urban1k")
    write_docci(root / "docci")
    write_himo_docci(root / "docci")
    write_long_dci(root / "dci")
    write_flickr30k(root / "flickr")
    write_coco_sets(root / "coco")
    write_cola(root / "cola")
    return root
