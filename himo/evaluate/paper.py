"""Tables 1 to 3 of HiMo-CLIP (arXiv 2511.06653), as printed.

Transcribed from the paper as published (AAAI-26, pages 26977 and 26978) and compared with the
pictures of the three tables in the released repository, github.com/UnicomAI/HiMo-CLIP. An entry
without a value, "-", is one that the paper does not give. `*` marks methods that the authors ran
again, and FG-CLIP+ stands for the paper's dagger: it uses ViT-L/14 at 336 pixels.
"""

from typing import NamedTuple

OURS = "HiMo-CLIP"  # "Ours" in the paper
BACKBONES = ("ViT-B/16", "ViT-L/14")


class Column(NamedTuple):
    """One column: the mean of a measure over data sets, which is one set but in "Avg"."""

    group: str
    name: str
    sets: tuple[str, ...]
    measure: str
    decimals: int = 1


class PaperTable(NamedTuple):
    """A table of the paper: `rows` are (method, backbone, a value for each column)."""

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, str, tuple[float | None, ...]], ...]


def _both_ways(*sets: tuple[str, str]) -> tuple[Column, ...]:
    return tuple(
        Column(title, way, (name,), f"R@1 {way}") for name, title in sets for way in ("I2T", "T2I")
    )


def _rows(text: str) -> tuple[tuple[str, str, tuple[float | None, ...]], ...]:
    rows = []
    for line in text.strip().splitlines():
        method, backbone, values = (part.strip() for part in line.split("|"))
        numbers = values.replace("/", " ").split()
        rows.append((method, backbone, tuple(None if x == "-" else float(x) for x in numbers)))
    return tuple(rows)


_LONG = ("urban1k", "docci", "long-dci")
_SHORT_TITLES = ("Ur.", "Doc.", "LD.")


def _growth(measure: str, group: str) -> tuple[Column, ...]:
    single = [
        Column(group, title, (name,), measure)
        for name, title in zip(_LONG, _SHORT_TITLES, strict=True)
    ]
    return (*single, Column(group, "Avg", _LONG, measure))


TABLES = (
    PaperTable(
        1,
        "Long-caption retrieval, R@1 in %",
        _both_ways(("urban1k", "Urban1k"), ("docci", "Docci"), ("long-dci", "Long-DCI")),
        _rows("""
            CLIP         | ViT-B/16     | 68.1/53.6 58.5/58.2 35.0/33.1
            Long-CLIP    | ViT-B/16     | 78.9/79.5 63.2/71.5 42.2/48.4
            TULIP        | ViT-B/16     | 88.1/86.6 75.5/75.8 50.2/50.6
            FineLIP*     | ViT-B/16     | 88.2/88.2 75.8/77.3 55.8/53.1
            LoTLIP       | ViT-B/16     | 88.8/84.8 73.2/71.6 54.5/53.3
            SigLIP       | ViT-B/16     | 63.0/62.3 70.2/70.6 45.4/43.0
            BLIP         | ViT-B/16     | 45.5/48.5 50.5/53.5 -/-
            EVA-02-CLIP  | ViT-B/16     | 67.0/60.8 67.7/68.0 -/-
            jina-clip-v2 | ViT-B/16     | 80.4/78.0 77.6/78.2 -/-
            MetaCLIP     | ViT-B/16     | 68.9/63.3 70.9/71.5 -/-
            HiMo-CLIP    | ViT-B/16     | 89.2/89.6 77.8/79.9 58.6/57.1
            CLIP         | ViT-L/14     | 68.7/52.8 57.5/60.7 33.4/31.3
            Long-CLIP    | ViT-L/14     | 82.7/86.1 66.5/78.6 46.5/54.3
            TULIP        | ViT-L/14     | 90.1/91.1 75.5/75.8 55.7/56.4
            FineLIP*     | ViT-L/14     | 92.3/91.2 81.5/82.6 59.6/58.5
            MetaCLIP     | ViT-L/14     | 73.4/70.0 76.5/76.7 -/-
            SAIL-L-NV2   | ViT-L/14     | 81.5/80.2 76.5/78.9 -/-
            EVA-02-CLIP  | ViT-L/14     | 73.3/68.5 73.5/75.0 47.3/47.9
            HiMo-CLIP    | ViT-L/14     | 93.0/93.1 82.4/84.4 62.2/61.9
        """),
    ),
    PaperTable(
        2,
        "Short-caption retrieval, R@1 in %",
        _both_ways(("flickr30k", "Flickr30k"), ("coco", "COCO")),
        _rows("""
            CLIP         | ViT-B/16     | 83.3/61.9 51.8/32.7
            EVA-02-CLIP  | ViT-B/16     | 85.7/71.2 58.7/42.2
            Long-CLIP    | ViT-B/16     | 87.3/70.7 57.6/40.4
            FineLIP*     | ViT-B/16     | 85.4/65.6 53.1/36.2
            LoTLIP       | ViT-B/16     | 86.9/65.2 59.6/38.1
            SigLIP       | ViT-B/16     | 89.8/75.1 65.4/47.2
            Action-CLIP  | ViT-B/16     | 88.1/74.7 58.4/43.2
            HiMo-CLIP    | ViT-B/16     | 88.4/72.1 60.6/40.8
            CLIP         | ViT-L/14     | 86.1/66.0 56.1/35.4
            Long-CLIP    | ViT-L/14     | 89.0/76.7 62.8/46.3
            TULIP        | ViT-L/14     | 89.0/73.5 62.6/46.1
            FineLIP*     | ViT-L/14     | 90.5/74.7 60.3/43.5
            Action-CLIP  | ViT-L/14-336 | 91.5/74.0 62.5/44.1
            HiMo-CLIP    | ViT-L/14     | 92.5/78.2 65.1/47.2
        """),
    ),
    PaperTable(
        3,
        "HiMo@2 and HiMo@3 in %, HiMo@K on HiMo-Docci, COLA in %",
        (
            *_growth("HiMo@2", "H2"),
            *_growth("HiMo@3", "H3"),
            Column("", "HK", ("himo-docci",), "HiMo@K", 2),
            Column("", "Ma.", ("cola",), "COLA"),
        ),
        _rows("""
            CLIP         | ViT-L/14     | 77.0 74.9 65.5 72.5 40.7 33.9 31.0 35.2  0.43 27.6
            EVA-02-CLIP  | ViT-L/14     | 78.0 70.0 70.8 72.9 24.4 26.7 31.3 27.5  0.28 25.7
            Long-CLIP    | ViT-L/14     | 34.8 16.7 53.5 35.0 39.4 28.5 41.9 36.6 -0.55 32.4
            TULIP        | ViT-L/14     | 97.2 89.2 83.9 90.1 62.1 46.6 45.1 51.3  0.67 34.8
            FineLIP*     | ViT-L/14     | 97.9 98.5 92.8 96.4 64.9 60.6 53.7 59.7  0.83 34.3
            FG-CLIP+     | ViT-L/14-336 | 96.6 94.1 91.3 94.0 62.1 58.5 53.8 58.1  0.75 30.0
            HiMo-CLIP    | ViT-L/14     | 99.3 98.0 96.4 97.9 70.9 62.3 59.3 64.2  0.88 38.6
        """),
    ),
)
