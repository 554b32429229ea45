"""`himo explain`: how the similarity of images to their captions moves as the captions grow."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from statistics import mean
from typing import Any

import torch

from himo.checkpoint import add_model_arguments, load, model_arguments
from himo.errors import HimoError, printable
from himo.evaluate.captions import add_data_arguments, data_options
from himo.evaluate.encode import Encoder
from himo.evaluate.himo_k import MORE_THAN
from himo.evaluate.result import data_url
from himo.files import output_path, write_text
from himo.report import export, versions
from himo.report.chosen import Chosen, from_data, from_file
from himo.report.growth import Example, card, falls, pearson
from himo.report.rendering import render
from himo.report.runs import distinct_names, plural
from himo.transforms import ImageError, open_image
from himo_charts.scales import fixed, number

_PICTURE, _SEVERAL = 640, 320  # pixels of the longer side of an image on the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo explain`."""
    parser.add_argument("image", nargs="?", help="an image file")
    parser.add_argument(
        "caption",
        nargs="*",
        help="a caption, which is cut into its sentences; or several texts, each a segment",
    )
    parser.add_argument(
        "--pretrained",
        required=True,
        action="append",
        metavar="CKPT",
        help="checkpoint of any format himo loads; may be given more than once to compare",
    )
    text = "instead of an image and a caption: a data set, as of himo eval"
    parser.add_argument("--data", metavar="PATH", help=text)
    text = "an image of --data by its name; may be given more than once (default: 6 are drawn)"
    parser.add_argument("--image", dest="wanted", action="append", metavar="NAME", help=text)
    text = "cut each caption into K segments of whole sentences (default: a sentence each)"
    parser.add_argument("--k", type=int, help=text)
    parser.add_argument(
        "--out", default="explain.html", metavar="FILE", help="the page (default: %(default)s)"
    )
    add_model_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    export.add_arguments(parser)
    add_data_arguments(parser)
    _allow_flags_between(parser)


def _allow_flags_between(parser: argparse.ArgumentParser) -> None:
    """The caption may follow flags that follow the image, though both may be left out."""
    plain = parser.parse_known_args

    def parse(*arguments: Any, **optional: Any) -> Any:
        parser.parse_known_args = plain  # type: ignore[method-assign]  # the next line calls it
        return parser.parse_known_intermixed_args(*arguments, **optional)

    parser.parse_known_args = parse  # type: ignore[method-assign]


def run(args: argparse.Namespace) -> int:
    """`himo explain`: prints the scores and writes the page."""
    page = output_path(args.out, ".html")
    names = distinct_names(args.pretrained)
    chosen = _chosen(args)
    # Before the models: most mistakes are here.
    side = _PICTURE if len(chosen.rows) == 1 else _SEVERAL
    pictures = [_picture(chosen, place, side) for place in range(len(chosen.rows))]
    export.check(args)
    scores = [
        growth(checkpoint, chosen, args.device, **model_arguments(args))
        for checkpoint in args.pretrained
    ]
    of_images = list(zip(*scores, strict=True))
    examples = [
        Example(image, picture, tuple(segments), tuple(enumerate(of_image)))
        for image, picture, segments, of_image in zip(
            chosen.names, pictures, chosen.segments, of_images, strict=True
        )
    ]
    write_text(page, explain_page(examples, names, args.pretrained, datetime.now()))
    for example in examples:
        if len(examples) > 1:
            print(printable(example.image))
        print(table(example.segments, names, [of_model for _, of_model in example.scores]))
    print(f"page: {page.resolve()}")
    export.export(args, page, names)
    return 0


def _chosen(args: argparse.Namespace) -> Chosen:
    """The images that the arguments name."""
    if args.k is not None and args.k < 2:
        raise HimoError(f"--k: expected at least 2, got {args.k}")
    if args.data is not None:
        if args.image is not None:
            raise HimoError(f"--data: expected no image and caption beside it, got {args.image!r}")
        return from_data(args.data, args.wanted or (), args.k, data_options(args))
    if args.wanted:
        raise HimoError("--image: expected a data set to take it from, --data")
    if args.image is None or not args.caption:
        raise HimoError("expected an image and its caption, or --data")
    return from_file(args.image, args.caption, args.k)


def _picture(chosen: Chosen, place: int, side: int) -> str:
    row = chosen.rows[place]
    try:
        picture = open_image(chosen.images.image_source(row)).convert("RGB")
    except ImageError as error:
        raise HimoError(f"{chosen.images.describe(row)}: {error}") from error
    return data_url(picture, side, 85)


def growth(checkpoint: str, chosen: Chosen, device: str, **options: Any) -> list[tuple[float, ...]]:
    """For each image its cosine similarity to the texts that grow, in float32.

    Args:
        checkpoint, device: of the model.
        options: further arguments of `himo.load`.

    Raises:
        HimoError: the checkpoint or an image cannot be read, or features are not finite.
    """
    model, preprocess = load(checkpoint, device, **options)
    encoder = Encoder(model, preprocess, batch_size=16, workers=1)

    def failed(position: int, reason: str, message: str) -> None:
        raise HimoError(message)

    features = encoder.images(chosen.images, chosen.rows, failed)
    texts = [text for of_image in chosen.prefixes for text in of_image]
    lengths = [len(of_image) for of_image in chosen.prefixes]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    scored = encoder.score_texts(texts, torch.arange(len(texts)), owner, features, 0)
    if scored.not_finite.any():
        raise HimoError(f"{checkpoint}: its features of the caption are not finite")
    if scored.cut:
        what = f"{plural(scored.cut, 'prefix is', 'prefixes are')} longer than"
        message = f"himo: {checkpoint}: {what} {model.context_length} tokens and cut"
        print(message, file=sys.stderr)
    return [tuple(part.tolist()) for part in scored.scores.split(lengths)]


def explain_page(
    examples: Sequence[Example], names: Sequence[str], checkpoints: Sequence[str], now: datetime
) -> str:
    """The page of some images, which calls the models by `names`."""
    alone = examples[0] if len(examples) == 1 else None
    return render(
        "explain.html",
        noun="explain",
        title=f"{alone.image if alone else plural(len(examples), 'image')}: similarity",
        names=names,
        steps=len(alone.segments) - 1 if alone else 0,
        fallen=[len(falls(scores)) for _, scores in alone.scores] if alone else [],
        summaries=[] if alone else [_summary(examples, run) for run in range(len(names))],
        shown=[card(f"growth-{place}", example, names) for place, example in enumerate(examples)],
        checkpoints=[f"Checkpoint: {checkpoint}" for checkpoint in checkpoints],
        versions=versions(),
        now=now,
    )


def _summary(examples: Sequence[Example], run: int) -> str:
    """In how many of several images a model's scores rise throughout, and their HiMo@K."""
    series = [example.scores[run][1] for example in examples]
    rising = sum(not falls(scores) for scores in series)
    words = f"in {rising} of {plural(len(series), 'image')}"
    correlated = [pearson(scores) for scores in series if len(scores) > MORE_THAN]
    if correlated:
        which = {len(scores) for scores in series if len(scores) > MORE_THAN}
        k = which.pop() if len(which) == 1 else "K"
        words += f" (mean HiMo@{k} {fixed(mean(correlated), 3)})"
    return words


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
