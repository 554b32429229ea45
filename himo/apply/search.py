"""`himo search`: the images that fit a text best, among features of `himo encode`."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from torch import Tensor

from himo.apply import add_encoder_arguments, open_encoder, open_images, text_features
from himo.apply.features import About, read_features
from himo.checkpoint import MODEL_ARGUMENTS, digest
from himo.errors import HimoError, note, quoted
from himo.files import output_path, write_text
from himo.report import versions
from himo.report.rendering import render
from himo.report.runs import plural
from himo.tokenizer import default_tokenizer

Found = list[tuple[int, float]]  # (row of the features, cosine similarity), the best first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo search`."""
    parser.add_argument("text", nargs="+", metavar="TEXT", help="what to look for; several in one")
    parser.add_argument(
        "--features", required=True, metavar="FILE", help="written by `himo encode`"
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="images of a text (default: %(default)s)"
    )
    parser.add_argument(
        "--out", default="search.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    add_encoder_arguments(parser, required=False)


def run(args: argparse.Namespace) -> int:
    """Prints the best images of each text and writes a page with their thumbnails."""
    page = output_path(args.out, ".html")
    if args.top < 1:
        raise HimoError(f"--top: expected at least 1, got {args.top}")
    for text in args.text:
        if not default_tokenizer().encode(text):  # also of what cleaning makes white space
            raise HimoError(f"TEXT: expected at least one token, got {quoted(text)}")
    features, about = read_features(args.features)
    _take_model(args, about)
    texts = text_features(open_encoder(args), args.text)
    found = [nearest(text, features, args.top) for text in texts]
    thumbnails = _thumbnails(about, {row for of_text in found for row, _ in of_text})
    sections = [
        (
            text,
            [
                {"name": about.ids[row], "value": f"{score:.4f}", "thumbnail": thumbnails.get(row)}
                for row, score in of_text
            ],
        )
        for text, of_text in zip(args.text, found, strict=True)
    ]
    write_text(page, search_page(sections, args, len(features)))
    for text, pictures in sections:
        print(text)
        print("\n".join(f"  {picture['value']}  {picture['name']}" for picture in pictures))
    print(f"page: {page.resolve()}")
    return 0


def nearest(text: Tensor, features: Tensor, count: int) -> Found:
    """The rows of features [N, E] with the highest product with text [E]; ties in row order."""
    scores = features @ text
    order = scores.argsort(descending=True, stable=True)[:count]
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))


def search_page(
    sections: Sequence[tuple[str, list[dict[str, Any]]]], args: argparse.Namespace, images: int
) -> str:
    """The page: a section of pictures for each text."""
    return render(
        "search.html",
        noun="search",
        title=f"Search: {args.text[0]}",
        names=(),
        sections=sections,
        images=plural(images, "image"),
        texts=plural(len(sections), "text"),
        checkpoints=[f"Checkpoint: {args.pretrained}", f"Features: {args.features}"],
        versions=versions(),
        now=datetime.now(),
    )


def _take_model(args: argparse.Namespace, about: About) -> None:
    """Sets the flags of the model to the model with which the images were encoded.

    Raises:
        HimoError: --pretrained is another model, or the file of that model has changed.
    """
    stored = dict(about.model)
    sha256, pretrained = stored.pop("sha256"), stored.pop("pretrained")
    args.pretrained = args.pretrained or pretrained
    if digest(args.pretrained) != sha256:
        raise HimoError(f"{args.pretrained}: not the model that encoded {args.features}")
    for name in MODEL_ARGUMENTS:
        setattr(args, name, stored[name])


def _thumbnails(about: About, wanted: set[int]) -> dict[int, str | None]:
    """The image of each wanted row of the features, where the data set still has it."""
    options = {**about.data, "allow_missing": True}
    try:
        opened = open_images(options.pop("given"), **options)
    except HimoError as error:
        note(f"the page has no thumbnails: {error}")
        return {}
    positions = {name: position for position, name in enumerate(opened.ids)}
    there = [row for row in sorted(wanted) if about.ids[row] in positions]
    shown = opened.thumbnails([positions[about.ids[row]] for row in there])
    return dict(zip(there, shown, strict=True))
