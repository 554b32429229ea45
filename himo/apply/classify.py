"""`himo classify`: the label that fits an image best, without training (zero-shot)."""

import argparse
import csv
import io
import os
from collections.abc import Sequence
from datetime import datetime

import torch
from torch import Tensor

from himo.apply import Opened, add_encoder_arguments, open_encoder, open_images, text_features
from himo.checkpoint import files_of
from himo.errors import HimoError, quoted
from himo.evaluate.captions import add_data_arguments, data_options
from himo.files import keep_inputs, open_regular, output_path, write_text
from himo.printing import csv_cell
from himo.report import versions
from himo.report.rendering import render
from himo.report.runs import plural

_LARGEST = 16 << 20  # bytes of a file of labels
_SHOWN = 20  # images in the terminal
_PICTURES = 200  # images on the page
_BEST = 5  # labels of an image on the page, and 3 in the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo classify`."""
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="image files, a folder of them, or a data set"
    )
    parser.add_argument(
        "--labels",
        required=True,
        metavar="LABELS",
        help="a file with a label on each line, or labels with commas between them",
    )
    parser.add_argument(
        "--template",
        default="a photo of a {}.",
        metavar="TEXT",
        help="the text of a label, which replaces {} (default: %(default)r)",
    )
    text = "the page; all probabilities go next to it as .csv (default: %(default)s)"
    parser.add_argument("--out", default="classify.html", metavar="FILE", help=text)
    add_encoder_arguments(parser)
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the best labels of each image; writes a page with thumbnails, and a csv."""
    page = output_path(args.out, ".html")
    reads = [*args.images, args.labels, *files_of(args.pretrained)]
    keep_inputs(f"--out {page}", [page, page.with_suffix(".csv")], reads)
    if "{}" not in args.template:
        raise HimoError(f"--template: expected a text with {{}} in it, got {args.template!r}")
    labels = read_labels(args.labels)
    opened = open_images(args.images, **data_options(args))
    encoder = open_encoder(args)
    texts = text_features(encoder, [args.template.replace("{}", label) for label in labels])
    features = opened.features(encoder)
    scale = encoder.model.logit_scale.detach().exp().cpu()
    probabilities = (scale * features @ texts.t()).softmax(dim=1)
    write_text(page.with_suffix(".csv"), _csv(opened.ids, labels, probabilities))
    write_text(page, classify_page(opened, labels, probabilities, args))
    print(table(opened.ids, labels, probabilities))
    print(f"page: {page.resolve()}, all probabilities: {page.with_suffix('.csv').name}")
    return 0


def read_labels(given: str) -> list[str]:
    """The labels of a file, one on each line, or of a list with commas.

    Raises:
        HimoError: there are fewer than two, one is there twice, or the file cannot be read.
    """
    is_file = os.path.exists(given)
    if is_file:
        with open_regular(given) as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise HimoError(f"--labels {given}: expected at most {_LARGEST:,} bytes")
        try:
            parts = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise HimoError(f"--labels {given}: expected text in UTF-8: {error}") from error
    else:
        parts = given.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2:
        not_there = "" if is_file else ", and there is no file of this name"
        raise HimoError(f"--labels: expected at least two labels, got {quoted(given)}{not_there}")
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice is not None:
        raise HimoError(f"--labels: {quoted(twice)} is given twice")
    return labels


def best(row: Tensor, labels: Sequence[str], count: int) -> list[tuple[str, float]]:
    """(label, probability) of the most probable labels; row is [L]."""
    values, order = row.sort(descending=True, stable=True)
    chosen = zip(order.tolist(), values.tolist(), strict=True)
    return [(labels[label], value) for label, value in list(chosen)[:count]]


def classify_page(
    opened: Opened, labels: Sequence[str], probabilities: Tensor, args: argparse.Namespace
) -> str:
    """The page: a picture of each image with its most probable labels."""
    thumbnails = opened.thumbnails(range(min(_PICTURES, len(opened.ids))))
    pictures = [
        {
            "name": opened.ids[position],
            "thumbnail": shown,
            "bars": [
                (label, f"{100 * value:.1f}", f"{100 * value:.2f}")
                for label, value in best(probabilities[position], labels, _BEST)
            ],
        }
        for position, shown in enumerate(thumbnails)
    ]
    first = torch.bincount(probabilities.argmax(dim=1), minlength=len(labels))
    counts = best(first, labels, _BEST)
    return render(
        "classify.html",
        noun="classify",
        title=f"{plural(len(opened.ids), 'image')}, {plural(len(labels), 'label')}",
        names=(),
        pictures=pictures,
        images=plural(len(opened.ids), "image"),
        labels=plural(len(labels), "label"),
        counts=[(label, plural(int(count), "image")) for label, count in counts if count],
        text=args.template,
        more=len(opened.ids) - len(pictures),
        checkpoints=[f"Checkpoint: {args.pretrained}"],
        versions=versions(),
        now=datetime.now(),
    )


def table(ids: Sequence[str], labels: Sequence[str], probabilities: Tensor) -> str:
    """The three best labels of the first images, for a terminal."""
    width = max(len(name) for name in ids[:_SHOWN])
    lines = [
        f"{name:<{width}}  "
        + "  ".join(f"{100 * value:5.1f} % {label}" for label, value in best(row, labels, 3))
        for name, row in zip(ids[:_SHOWN], probabilities, strict=False)
    ]
    if len(ids) > _SHOWN:
        lines.append(f"and {len(ids) - _SHOWN:,} more")
    return "\n".join(lines)


def _csv(ids: Sequence[str], labels: Sequence[str], probabilities: Tensor) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["image", "label", *map(csv_cell, labels)])
    top = probabilities.argmax(dim=1).tolist()
    for name, label, row in zip(ids, top, probabilities.tolist(), strict=True):
        writer.writerow([csv_cell(name), csv_cell(labels[label]), *(f"{p:.6g}" for p in row)])
    return buffer.getvalue()
