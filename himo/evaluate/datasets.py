"""The data sets of the paper by name: how each lies on disk, and where it comes from.

The sources are in `datasets.md`, next to this file.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from himo.errors import HimoError


class Layout(NamedTuple):
    """One way in which a set lies on disk. Paths are relative to its folder.

    Attributes:
        file: the file that is read; "." is the folder itself.
        images: where the images may be; the first directory that exists is taken.
        options: further arguments of `himo.data.open_dataset`.
    """

    file: str
    images: tuple[str, ...] = ()
    options: Mapping[str, Any] = {}

    def looked_for(self) -> str:
        """What this layout needs, for a message."""
        places = " or ".join(f"{folder}/" for folder in self.images if folder != ".")
        if self.file == ".":
            return f"{' and '.join(f'{folder}/' for folder in self.images)}"
        return f"{self.file} with images in {places}" if places else self.file


@dataclass(frozen=True)
class DataSet:
    """A data set that has a name.

    Attributes:
        title: as the paper writes it.
        tables: of the paper that hold its results.
        folders: names of its folder below --data-root.
        layouts: in the order in which they are looked for.
        images, captions: how many it has; 0 where the sources do not say.
        source, licence: where it comes from, and on which terms.
        split: the part that is scored.
        captions_per_image: the captions of an image that are used, as in the released scripts.
        kind: "captions"; "prefixes" as HiMo-Docci; "groups" as COLA.
    """

    title: str
    tables: str
    folders: tuple[str, ...]
    layouts: tuple[Layout, ...]
    images: int
    captions: int
    source: str
    licence: str
    split: str = "all"
    captions_per_image: int | None = None
    kind: str = "captions"


_DOCCI = {"image_key": "image_file", "caption_key": "description", "split": "test"}
_DOCCI_IMAGES = ("images", "../docci/images", "../DOCCI/images")
_DCI_IMAGES = ("SA1B", "photos", "images", "../SA1B", ".")
_FLICKR_IMAGES = ("flickr30k-images", "flickr30k_images", "images")
_COLA = "COLA_multiobjects_matching_benchmark.json"
_COLA_IMAGES = ("vg_gqa_images", "images", ".")
_TEST = {"split": "test"}

SETS: dict[str, DataSet] = {
    "urban1k": DataSet(
        title="Urban1k",
        tables="1, 3",
        folders=("Urban1k", "urban1k"),
        layouts=(
            Layout(".", ("image", "caption"), {"dataset_type": "folder", "first_line": True}),
        ),
        images=1000,
        captions=1000,
        source="https://huggingface.co/datasets/BeichenZhang/Urban1k",
        licence="CC BY-NC 4.0",
    ),
    "docci": DataSet(
        title="Docci",
        tables="1, 3",
        folders=("docci", "DOCCI"),
        layouts=(
            Layout("docci_descriptions.jsonlines", _DOCCI_IMAGES[:1], _DOCCI),
            Layout("test_set.jsonl", _DOCCI_IMAGES[:1], _DOCCI),
        ),
        images=5000,
        captions=5000,
        source="https://google.github.io/docci",
        licence="CC BY 4.0",
        split="test",
    ),
    "long-dci": DataSet(
        title="Long-DCI",
        tables="1, 3",
        folders=("dci", "dci_long", "Long-DCI", "long-dci"),
        layouts=(
            Layout("dci_long.csv", _DCI_IMAGES, {"separator": "\t"}),
            Layout("annotations", _DCI_IMAGES, {"dataset_type": "dci"}),
        ),
        images=0,
        captions=0,
        source="https://huggingface.co/datasets/mderakhshani/Long-DCI, images: SA-1B",
        licence="CC BY-NC 4.0; images: SA-1B's terms",
    ),
    "flickr30k": DataSet(
        title="Flickr30k",
        tables="2",
        folders=("flickr30k", "flickr", "Flickr30k"),
        layouts=(
            Layout("dataset_flickr30k.json", _FLICKR_IMAGES, _TEST),
            Layout("test_1k.txt", _FLICKR_IMAGES, {"dataset_type": "flickr"}),
        ),
        images=1000,
        captions=5000,
        source=(
            "https://shannon.cs.illinois.edu/DenotationGraph, split: "
            "https://cs.stanford.edu/people/karpathy/deepimagesent"
        ),
        licence="captions: CC BY 3.0; images: Flickr's terms, research only",
        split="test, 1k",
        captions_per_image=5,
    ),
    "coco": DataSet(
        title="COCO",
        tables="2",
        folders=("coco", "COCO"),
        layouts=(Layout("annotations/captions_val2017.json", ("val2017", "images/val2017")),),
        images=5000,
        captions=25000,
        source="https://cocodataset.org/#download",
        licence="captions: CC BY 4.0; images: Flickr's terms",
        split="val2017",
        captions_per_image=5,
    ),
    "coco-karpathy": DataSet(
        title="COCO, Karpathy",
        tables="",
        folders=("coco", "COCO"),
        layouts=tuple(
            Layout(f"{folder}dataset_coco.json", (".", "images"), _TEST)
            for folder in ("", "annotations/", "karpathy/")
        ),
        images=5000,
        captions=25000,
        source=(
            "https://cs.stanford.edu/people/karpathy/deepimagesent, images: val2014 of "
            "https://cocodataset.org/#download"
        ),
        licence="captions: CC BY 4.0; images: Flickr's terms",
        split="test, 5k",
        captions_per_image=5,
    ),
    "himo-docci": DataSet(
        title="HiMo-Docci",
        tables="3",
        folders=("himo_docci", "HiMo-Docci", "docci", "DOCCI"),
        layouts=(
            Layout("himo_docci_data.json", _DOCCI_IMAGES),
            Layout("himo_docci.jsonl", _DOCCI_IMAGES),
        ),
        images=1000,
        captions=6660,
        source="https://huggingface.co/datasets/5RJ/HiMo-Docci, images: DOCCI's",
        licence="Apache-2.0, after DOCCI, CC BY 4.0",
        kind="prefixes",
    ),
    "cola": DataSet(
        title="COLA, multi-object",
        tables="3",
        folders=("cola", "COLA"),
        layouts=(Layout(_COLA, _COLA_IMAGES), Layout(f"data/{_COLA}", _COLA_IMAGES)),
        images=218,
        captions=420,
        source="https://github.com/arijitray1993/COLA, images: Visual Genome's",
        licence="MIT; images: CC BY 4.0",
        kind="groups",
    ),
}
SUITES = {"paper": ("urban1k", "docci", "long-dci", "flickr30k", "coco", "himo-docci", "cola")}


class NotFound(HimoError):
    """A data set is not where it was looked for; `where` says the place."""

    def __init__(self, name: str, where: str) -> None:
        of = SETS[name]
        wanted = "; or ".join(layout.looked_for() for layout in of.layouts)
        super().__init__(
            f"{name}: expected {wanted}, in {where}; {of.title} comes from {of.source} "
            f"({of.licence})"
        )
        self.where = where


@dataclass(frozen=True)
class Place:
    """Where a data set is: arguments of its reader."""

    path: str
    image_root: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


def locate(name: str, root: str | os.PathLike[str]) -> Place:
    """The place of a data set in its folder.

    Raises:
        NotFound: what was looked for, where, and where the set comes from.
    """
    for layout in SETS[name].layouts:
        place = _place(layout, os.fspath(root))
        if place is not None:
            return place
    raise NotFound(name, _shown(root))


def locate_below(name: str, data_root: str | os.PathLike[str]) -> Place:
    """The place of a data set in one of its usual folders below `data_root`.

    Raises:
        NotFound: as `locate`.
    """
    for folder in SETS[name].folders:
        for layout in SETS[name].layouts:
            place = _place(layout, os.path.join(data_root, folder))
            if place is not None:
                return place
    folders = " or ".join(f"{folder}/" for folder in SETS[name].folders)
    raise NotFound(name, f"{folders} of {_shown(data_root)}")


def _shown(folder: str | os.PathLike[str]) -> str:
    return f"{os.fspath(folder)}{'' if os.path.isdir(folder) else ', which is no folder'}"


def _place(layout: Layout, root: str) -> Place | None:
    path = os.path.normpath(os.path.join(root, layout.file))
    if layout.file == ".":
        folders = [os.path.join(root, name) for name in layout.images]
        return Place(path, None, layout.options) if all(map(os.path.isdir, folders)) else None
    directories = [os.path.normpath(os.path.join(root, name)) for name in layout.images]
    images = next(filter(os.path.isdir, directories), None)
    if not os.path.exists(path) or images is None:
        return None
    return Place(path, images, layout.options)


def named(value: str) -> tuple[str | None, str]:
    """(name of a data set, its folder) of NAME:FOLDER or NAME; (None, value) of another path.

    Raises:
        HimoError: it is of that form, but no data set has this name.
    """
    name, colon, folder = value.partition(":")
    if name in SETS and (colon or not os.path.exists(value)):
        if colon and not folder:
            raise HimoError(f"--data: expected NAME:FOLDER, got {value!r}")
        return name, folder
    if colon and name.replace("-", "").isalnum() and not os.path.exists(value):
        names = ", ".join(SETS)
        raise HimoError(f"--data: expected a path, or NAME:FOLDER of {names}, got {value!r}")
    return None, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `himo datasets`."""
    parser.add_argument("sets", nargs="*", metavar="NAME:FOLDER", help="where a set should be")
    parser.add_argument("--data-root", metavar="DIR", help="look for the others below this folder")


def run(args: argparse.Namespace) -> int:
    """`himo datasets`: lists the sets; with a folder, the files found and the files missing."""
    folders = {}
    for value in args.sets:
        name, folder = named(value)
        if name is None:
            raise HimoError(f"datasets: expected NAME:FOLDER of {', '.join(SETS)}, got {value!r}")
        if name in folders:
            raise HimoError(f"datasets: expected each set once, got {name} again: {value!r}")
        folders[name] = folder
    for name in folders if folders and not args.data_root else SETS:
        print("\n".join(_description(name, folders.get(name, ""), args.data_root)))
    return 0


def _description(name: str, folder: str, data_root: str | None) -> Sequence[str]:
    of = SETS[name]
    size = f"{of.images:,} images, {of.captions:,} captions" if of.images else "up to 7,805 images"
    table = f"table{'s' if ',' in of.tables else ''} {of.tables}" if of.tables else "no table"
    lines = [f"{name}: {of.title}; split {of.split}; {size}; {table} of the paper"]
    lines += [f"  layout: {'; or '.join(layout.looked_for() for layout in of.layouts)}"]
    lines += [f"  from: {of.source} ({of.licence})"]
    if folder or data_root:
        try:
            place = locate(name, folder) if folder else locate_below(name, data_root or "")
            lines.append(f"  found: {place.path}")
        except NotFound as error:
            lines.append(f"  missing: not in {error.where}")
    return lines
