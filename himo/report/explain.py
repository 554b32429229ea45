"""`himo explain`: how one image's similarity to a caption moves as the caption grows."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import torch

from himo.checkpoint import add_model_arguments, load, model_arguments
from himo.errors import HimoError, printable
from himo.evaluate.encode import Encoder, GivenFiles
from himo.evaluate.metrics import caption_segments, sentence_prefixes
from himo.evaluate.result import data_url
from himo.files import output_path, write_text
from himo.report import versions
from himo.report.growth import Example, card, falls, pearson
from himo.report.rendering import render
from himo.report.runs import distinct_names, plural
from himo.transforms import open_image
from himo_charts.scales import number

_PICTURE = 640  # pixels of the longer side of the image on the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo explain`."""
    parser.add_argument("image", help="an image file")
    parser.add_argument(
        "caption",
        nargs="+",
        help="a caption, which is cut into its sentences; or several texts, each a segment",
    )
    parser.add_argument(
        "--pretrained",
        required=True,
        action="append",
        metavar="CKPT",
        help="checkpoint of any format himo loads; may be given more than once to compare",
    )
    parser.add_argument(
        "--out", default="explain.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    add_model_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def run(args: argparse.Namespace) -> int:
    """`himo explain`: prints the scores and writes the page."""
    page = output_path(args.out, ".html")
    segments = cut(args.caption)
    names = distinct_names(args.pretrained)
    picture = open_image(args.image).convert("RGB")  # before the models: most mistakes are here
    scores = [
        growth(checkpoint, args.image, segments, args.device, **model_arguments(args))
        for checkpoint in args.pretrained
    ]
    shown = data_url(picture, _PICTURE, 85)
    example = Example(args.image, shown, tuple(segments), tuple(enumerate(scores)))
    write_text(page, explain_page(example, names, args.pretrained, datetime.now()))
    print(table(segments, names, scores))
    print(f"page: {page.resolve()}")
    return 0


def cut(captions: Sequence[str]) -> list[str]:
    """The segments of a caption as `caption_segments`; several texts are a segment each.

    Raises:
        HimoError: there are fewer than two.
    """
    several = len(captions) > 1
    segments = [c.strip() for c in captions] if several else caption_segments(captions[0])
    if len(segments) < 2 or not all(segments):
        raise HimoError(
            f"caption: expected at least two sentences, or several texts, got {captions[0]!r}"
        )
    return segments


def growth(
    checkpoint: str, image: str, segments: Sequence[str], device: str, **options: Any
) -> tuple[float, ...]:
    """Cosine similarity of an image file and the first 1, 2, ... segments, in float32.

    Args:
        checkpoint, device: of the model.
        image: the file.
        segments: of the caption.
        options: further arguments of `himo.load`.

    Raises:
        HimoError: the checkpoint or the image cannot be read, or features are not finite.
    """
    model, preprocess = load(checkpoint, device, **options)
    encoder = Encoder(model, preprocess, batch_size=16, workers=1)

    def failed(position: int, reason: str, message: str) -> None:
        raise HimoError(message)

    features = encoder.images(GivenFiles([image]), [0], failed)
    prefixes = sentence_prefixes(segments)
    of_image = torch.zeros(len(prefixes), dtype=torch.int64)
    scored = encoder.score_texts(prefixes, torch.arange(len(prefixes)), of_image, features, 0)
    if scored.not_finite.any():
        raise HimoError(f"{checkpoint}: its features of the caption are not finite")
    if scored.cut:
        what = f"{plural(scored.cut, 'prefix is', 'prefixes are')} longer than"
        message = f"himo: {checkpoint}: {what} {model.context_length} tokens and cut"
        print(message, file=sys.stderr)
    return tuple(scored.scores.tolist())


def explain_page(
    example: Example, names: Sequence[str], checkpoints: Sequence[str], now: datetime
) -> str:
    """The page of one image, which calls the models by `names`."""
    return render(
        "explain.html",
        noun="explain",
        title=f"{example.image}: similarity",
        names=names,
        steps=len(example.segments) - 1,
        fallen=[len(falls(scores)) for _, scores in example.scores],
        shown=card("growth", example, names),
        checkpoints=[f"Checkpoint: {checkpoint}" for checkpoint in checkpoints],
        versions=versions(),
        now=now,
    )


def table(segments: Sequence[str], names: Sequence[str], scores: Sequence[Sequence[float]]) -> str:
    """The scores for a terminal; * where one does not rise."""
    names = [printable(name) for name in names]
    width = max(12, *(len(name) + 2 for name in names))
    lines = ["  k" + "".join(f"{name:>{width}}" for name in names) + "  segment added"]
    for k, segment in enumerate(segments, 1):
        cells = "".join(
            f"{of_model[k - 1]:>{width - 1}.4f}{'*' if k in falls(of_model) else ' '}"
            for of_model in scores
        )
        lines.append(f"{k:>3}{cells}  {printable(segment)}")
    lines.append("rho" + "".join(f"{number(pearson(s), 3):>{width - 1}} " for s in scores))
    return "\n".join(lines)
