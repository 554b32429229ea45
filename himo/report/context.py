"""`himo context`: what HiDe keeps of one caption in two batches, as figure 2 of the paper shows."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from himo.checkpoint import add_model_arguments, load, model_arguments
from himo.errors import HimoError, note, printable
from himo.evaluate.captions import add_data_arguments, data_options
from himo.evaluate.encode import Encoder
from himo.evaluate.himo_k import read_himo_docci
from himo.evaluate.suite import open_items
from himo.files import output_path, write_text
from himo.report import export, versions
from himo.report.chosen import segments_of
from himo.report.figures import Figure, bar_figure
from himo.report.rendering import render
from himo.report.runs import Run, Spectrum, distinct_names, plural
from himo.report.training import spectrum_charts
from himo_charts.scales import Scale, fixed, number
from himo_kernels import pca, project_reconstruct
from himo_kernels.nn import PRESETS

_POOL = 4096  # captions of a data set among which the most similar ones are searched
_MOST_SEGMENTS = 12  # that a chart has room for
_SHOWN = 6  # captions of each batch on the page
_DRAWN, _ALIKE = "drawn at random", "most like the caption"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo context`."""
    text = "a caption, which is cut into its sentences; or several texts, each a segment"
    parser.add_argument("caption", nargs="+", help=text)
    text = "checkpoint of any format himo loads"
    parser.add_argument("--pretrained", required=True, metavar="CKPT", help=text)
    text = (
        "data set, as of himo eval, whose captions fill the batches: once, for a batch drawn at "
        "random and one of those most like the caption; twice, for a batch drawn from each"
    )
    parser.add_argument("--data", required=True, action="append", metavar="PATH", help=text)
    text = "captions of a batch, with this one (default: %(default)s)"
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help=text)
    default = PRESETS["paper"]["variance_threshold"]
    text = "share of the variance that HiDe keeps (default: %(default)s)"
    parser.add_argument("--tau", type=float, default=default, help=text)
    text = "of the captions drawn (default: %(default)s)"
    parser.add_argument("--seed", type=int, default=0, help=text)
    text = "the page (default: %(default)s)"
    parser.add_argument("--out", default="context.html", metavar="FILE", help=text)
    add_model_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    export.add_arguments(parser)
    add_data_arguments(parser)


@dataclass(frozen=True)
class Kept:
    """What HiDe keeps of a caption in one batch.

    Attributes:
        name: of the batch.
        others: the other captions of the batch.
        rank: components kept.
        ratios: explained variance of each component.
        share: of the caption's squared distance from the batch's mean.
        added: for each segment, the share that HiDe keeps of its contribution. The contribution is
            the caption's feature minus the feature without the segment. None if it is zero.
        component: [D], the caption projected and reconstructed, eq. (1).
    """

    name: str
    others: Sequence[str]
    rank: int
    ratios: tuple[float, ...]
    share: float
    added: Sequence[float | None]
    component: Tensor


def run(args: argparse.Namespace) -> int:
    """`himo context`: prints the kept shares and writes the page."""
    page = output_path(args.out, ".html")
    _check(args)
    segments = segments_of(args.caption, None, at_most=_MOST_SEGMENTS)
    caption = " ".join(segments)
    most = max(_POOL, args.batch_size)
    pools = [_captions(path, data_options(args), caption, args.seed, most) for path in args.data]
    names = [_DRAWN, _ALIKE] if len(pools) == 1 else distinct_names(args.data)
    for path, pool in zip(args.data, pools, strict=True):
        if len(pool) < args.batch_size - 1:
            raise HimoError(
                f"--batch-size: expected at most {len(pool) + 1}, the different captions of {path} "
                f"and this one, got {args.batch_size}"
            )
    export.check(args)
    found = _measure(args, segments, pools, names)
    write_text(page, context_page(segments, found, args.tau, args.pretrained, datetime.now()))
    print(table(segments, found))
    print(f"page: {page.resolve()}")
    export.export(args, page, names)
    return 0


def _check(args: argparse.Namespace) -> None:
    if len(args.data) > 2:
        raise HimoError(f"--data: expected one or two data sets, got {len(args.data)}")
    if args.batch_size < 3:
        raise HimoError(f"--batch-size: expected at least 3, got {args.batch_size}")
    if not 0 < args.tau <= 1:
        raise HimoError(f"--tau: expected a number in (0, 1], got {args.tau}")


def _captions(data: str, options: dict[str, Any], caption: str, seed: int, most: int) -> list[str]:
    """At most `most` different captions of a data set in random order, without `caption`."""
    item = open_items([data], None, options, None)[0]
    if item.opened is not None:
        index = item.opened[0]
        texts = [index[row].caption for row in range(len(index))]
    elif item.kind == "prefixes":
        records, _ = read_himo_docci(item.path, allow_missing=options["allow_missing"])
        texts = [record.prefixes[-1] for record in records]
    else:
        raise HimoError(f"{data}: expected captions of images, got groups")
    different = dict.fromkeys(" ".join(text.split()) for text in texts)
    different.pop(caption, None)
    count = min(most, len(different))
    return random.Random(seed).sample(list(different), count)


def _measure(
    args: argparse.Namespace,
    segments: Sequence[str],
    pools: Sequence[Sequence[str]],
    names: Sequence[str],
) -> list[Kept]:
    model, preprocess = load(args.pretrained, args.device, **model_arguments(args))
    encoder = Encoder(model, preprocess)
    without = [" ".join([*segments[:k], *segments[k + 1 :]]) for k in range(len(segments))]
    own = _features(encoder, [" ".join(segments), *without], args.pretrained)
    added = own[0] - own[1:]
    others = args.batch_size - 1
    batches = []
    for pool in pools:
        # Of two sets, only a batch of each is encoded.
        drawn = pool if len(pools) == 1 else pool[:others]
        features = _features(encoder, drawn, args.pretrained)
        batches.append((drawn[:others], features[:others]))
        if len(pools) == 1:
            nearest = (features @ own[0]).topk(others).indices
            batches.append(([drawn[place] for place in nearest.tolist()], features[nearest]))
    return [
        kept_in(name, texts, torch.cat([own[:1], features]), added, args.tau)
        for name, (texts, features) in zip(names, batches, strict=True)
    ]


def _features(encoder: Encoder, texts: Sequence[str], checkpoint: str) -> Tensor:
    """L2-normalised features [T, D] in float64."""
    none = torch.empty(0, dtype=torch.int64)
    no_image = torch.empty(0, encoder.model.config.embed_dim)
    scored = encoder.score_texts(texts, none, none, no_image, len(texts))
    if scored.not_finite.any():
        raise HimoError(f"{checkpoint}: its features of a caption are not finite")
    if scored.cut:
        what = plural(scored.cut, "text is", "texts are")
        note(f"{what} longer than {encoder.model.context_length} tokens and cut")
    return F.normalize(scored.features.double(), dim=-1)


def kept_in(name: str, others: Sequence[str], batch: Tensor, added: Tensor, tau: float) -> Kept:
    """What HiDe keeps of the first row of a batch, and of each segment's contribution to it.

    Args:
        name, others: as in `Kept`.
        batch: [N, D] features, float64.
        added: [K, D], the contribution of each segment to batch[0].
        tau: the share of the variance to keep.
    """
    found = pca(batch, tau)
    rank = int(found.rank)
    component = project_reconstruct(batch[:1], found)[0]
    distance = (batch[0] - found.mean).square().sum()
    lengths = added.square().sum(dim=1)
    kept = (added @ found.components[:rank].T).square().sum(dim=1)
    return Kept(
        name,
        others,
        rank,
        tuple(found.explained_variance_ratio.tolist()),
        float((component - found.mean).square().sum() / distance) if distance > 0 else 1.0,
        [
            float(part / whole) if whole > 0 else None
            for part, whole in zip(kept, lengths, strict=True)
        ],
        component,
    )


def context_page(
    segments: Sequence[str], found: Sequence[Kept], tau: float, checkpoint: str, now: datetime
) -> str:
    """The page of a caption in two batches.

    Args:
        segments: of the caption.
        found: the result of each batch.
        now: the date on the page.
    """
    runs = [
        Run(
            Path(), of.name, {"loss": "himo", "tau": tau}, spectra=[Spectrum(0, of.rank, of.ratios)]
        )
        for of in found
    ]
    spectrum = spectrum_charts(runs)[0]
    numbers = replace(spectrum.table, note="Cumulative share of the variance of the batch.")
    return render(
        "context.html",
        noun="context",
        title="One caption in two batches",
        names=[of.name for of in found],
        set_of="" if found[0].name == _DRAWN else "of ",
        size=len(found[0].others) + 1,
        tau=f"{100 * tau:g}",
        cosine=fixed(_cosine(found), 3),
        batches=[
            {
                "name": of.name,
                "rank": of.rank,
                "share": _percent(of.share),
                "segments": [
                    (segment, f"{0.45 * (share or 0):.3f}", _percent(share))
                    for segment, share in zip(segments, of.added, strict=True)
                ],
                "others": of.others[:_SHOWN],
                "more": plural(max(0, len(of.others) - _SHOWN), "other"),
            }
            for of in found
        ],
        figures=[_bars(segments, found, runs), replace(spectrum, caption="", table=numbers)],
        checkpoints=[f"Checkpoint: {checkpoint}"],
        versions=versions(),
        now=now,
    )


def _bars(segments: Sequence[str], found: Sequence[Kept], runs: Sequence[Run]) -> Figure:
    bars = [[None if x is None else 100 * x for x in of.added] for of in found]
    caption = "Of what a segment adds to the caption’s feature: the part in the kept directions."
    return bar_figure(
        Figure("Kept of each segment", wide=True, caption=caption),
        "kept",
        "What HiDe keeps of each segment in both batches",
        runs,
        [str(k) for k in range(1, len(segments) + 1)],
        bars,
        Scale(0, 108),
        lambda value: f"{fixed(value, 1)} %",
        y_label="% of its squared length",
        chance=[None] * len(segments),
        decimals=0,
    )


def _cosine(found: Sequence[Kept]) -> float:
    """Of the caption's components in both batches."""
    return float(F.cosine_similarity(found[0].component, found[1].component, dim=0))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{fixed(100 * share, 1)} %"


def table(segments: Sequence[str], found: Sequence[Kept]) -> str:
    """What is kept, for a terminal."""
    names = [printable(of.name) for of in found]
    width = max(12, *(len(name) + 2 for name in names))

    def row(head: str, cells: Sequence[str], words: str = "") -> str:
        return f"{head:<8}" + "".join(f"{cell:>{width}}" for cell in cells) + words

    lines = [row("kept", names), row("R", [number(of.rank) for of in found])]
    lines.append(row("caption", [_percent(of.share) for of in found]))
    for k, segment in enumerate(segments, 1):
        cells = [_percent(of.added[k - 1]) for of in found]
        lines.append(row(str(k), cells, f"  {printable(segment)}"))
    lines.append(f"cosine of the caption's components in both: {_cosine(found):.3f}")
    return "\n".join(lines)
