"""`himo eval`: retrieval, HiMo@K and COLA of a checkpoint, as a table and eval.json."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from himo.checkpoint import add_model_arguments, digest, files_of, load, model_arguments
from himo.errors import HimoError
from himo.evaluate.captions import (
    CaptionScores,
    add_data_arguments,
    data_options,
    evaluate_captions,
    open_for_evaluation,
)
from himo.evaluate.cola import cola
from himo.evaluate.datasets import SUITES
from himo.evaluate.encode import Coverage, Encoder
from himo.evaluate.feature_cache import FeatureCache
from himo.evaluate.himo_k import PrefixScores, himo_k, read_himo_docci, score_himo_docci
from himo.evaluate.metrics import (
    growth_correlation,
    monotone_accuracy,
    recall,
    retrieval_ranks,
    segment_boundaries,
)
from himo.evaluate.result import (
    add_himo_docci,
    caption_curves,
    caption_misses,
    prefix_curves,
    table,
    write_result,
)
from himo.evaluate.retrieval import retrieval
from himo.evaluate.sentences import SENTENCE_RULE, SENTENCE_RULE_SHA256, split_sentences
from himo.evaluate.suite import Item, open_items, protocol_of, score
from himo.evaluate.tables import Model, csv_text, latex, tables, terminal
from himo.files import keep_inputs, output_path, write_text
from himo.precision import products_dtype
from himo_kernels import __version__

__all__ = [
    "SENTENCE_RULE",
    "SENTENCE_RULE_SHA256",
    "CaptionScores",
    "Coverage",
    "Encoder",
    "PrefixScores",
    "add_arguments",
    "cola",
    "evaluate_captions",
    "growth_correlation",
    "himo_k",
    "monotone_accuracy",
    "open_for_evaluation",
    "read_himo_docci",
    "recall",
    "retrieval",
    "retrieval_ranks",
    "run",
    "score_himo_docci",
    "segment_boundaries",
    "split_sentences",
]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_BESIDE = (".csv", ".tex", ".html")  # the tables of several sets or models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `himo eval`."""
    parser.add_argument(
        "--pretrained",
        required=True,
        action="append",
        metavar="CKPT",
        help="checkpoint, of any format himo loads; may be given more than once to compare",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="captioned images: json, csv, tsv, jsonl, folder or tar; or NAME:FOLDER of a set that "
        "`himo datasets` lists; may be given more than once",
    )
    parser.add_argument("--suite", choices=SUITES, help="all sets of the paper, for its tables")
    parser.add_argument("--data-root", metavar="DIR", help="the folder of the named sets' folders")
    add_data_arguments(parser)
    parser.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="take the first N captions of each image and require as many: 5 for COCO, Flickr30k",
    )
    parser.add_argument("--himo-docci", metavar="FILE", help="HiMo-Docci's prefixes, JSON lines")
    parser.add_argument("--cola", metavar="FILE", help="COLA's multi-object groups, JSON")
    text = "result; tables go next to it as .csv, .tex and .html (default: %(default)s)"
    parser.add_argument("--out", default="eval.json", help=text)
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--precision", default="fp32", choices=_DTYPES, help="of the model alone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU")
    text = "folder that caches features; with the same model and data they are read from it"
    parser.add_argument("--feature-cache", metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and writes the result; HimoError for a mistake of the user."""
    data = [*args.data, *SUITES.get(args.suite, ())]
    given = (("prefixes", args.himo_docci), ("groups", args.cola))
    more = [(kind, path) for kind, path in given if path]
    if not (data or more):
        raise HimoError(
            "expected a data set to evaluate on: --suite, --data, --himo-docci or --cola"
        )
    if args.suite and args.data_root is None:
        raise HimoError(f"--suite {args.suite}: expected the folder of its data sets, --data-root")
    several = bool(args.suite) or max(len(args.pretrained), len(data)) > 1
    out = output_path(args.out, ".json")
    # Before the models: most mistakes are here.
    items = open_items(data, args.data_root, data_options(args), args.captions_per_image, more)
    several = several or len({item.kind for item in items}) < len(items)
    written = [out, *(out.with_suffix(suffix) for suffix in _BESIDE if several)]
    models = [file for path in args.pretrained for file in files_of(path)]
    keep_inputs(f"--out {out}", written, [*models, *(item.path for item in items)])
    if several:
        return _run_suite(args, items, out)
    encoder = _encoder(args, args.pretrained[0])
    result = {"himo_version": __version__, "model": _describe(args, encoder, args.pretrained[0])}
    result |= _sections(encoder, items, args.allow_missing)
    write_result(out, result)
    print(f"{args.pretrained[0]}\n{table(result)}\nwrote {out}")
    return 0


def _sections(encoder: Encoder, items: Sequence[Item], allow_missing: bool) -> dict[str, Any]:
    """The sections of eval.json of one captioned set, one of prefixes and one of groups."""
    # In the order of the file: sections for people first, long lists last.
    result: dict[str, Any] = {}
    curves: list[dict[str, Any]] = []
    chosen: dict[str, str] = {}  # how the captions of each list were
    order = ("captions", "prefixes", "groups")
    for number, item in enumerate(sorted(items, key=lambda item: order.index(item.kind))):
        if item.opened is not None:
            captions = evaluate_captions(encoder, *item.opened, item.captions_per_image)
            result |= captions.sections
            curves, chosen["curves"] = caption_curves(captions)
            result["misses"], chosen["misses"] = caption_misses(captions)
        elif item.kind == "prefixes":
            prefixes = score_himo_docci(
                encoder, item.path, item.image_root, allow_missing=allow_missing
            )
            add_himo_docci(result, item.path, prefixes)
            if not curves:
                curves, chosen["curves"] = prefix_curves(prefixes)
        else:
            result["cola"] = cola(encoder, item.path, item.image_root, allow_missing=allow_missing)
        if number == 0:
            result["protocol"] = result.get("protocol", {}) | protocol_of(encoder, item)
    return result | {"curves": curves, "chosen": chosen}


def _run_suite(args: argparse.Namespace, items: Sequence[Item], out: Path) -> int:
    """Every set with every checkpoint: the tables of the paper, as JSON, csv, LaTeX and a page."""
    # Which needs this package.
    from himo.report.runs import distinct_names
    from himo.report.suite import suite_page

    models, described = [], []
    names = distinct_names(args.pretrained)
    for path in args.pretrained:
        digest(path)  # a checkpoint that is not there: before the first is scored
    for name, path in zip(names, args.pretrained, strict=True):
        encoder = _encoder(args, path)
        scored = {item.name: score(encoder, item, args.allow_missing) for item in items}
        models.append(Model(name, encoder.model.config, scored))
        sets = {item: of.to_dict() for item, of in scored.items()}
        described.append({"name": name, **_describe(args, encoder, path), "sets": sets})
    found = tables(models)
    result = {"himo_version": __version__, "tables": found, "models": described}
    contents = csv_text(found, models), latex(found), suite_page(found, models, described)
    write_result(out, result)
    for suffix, content in zip(_BESIDE, contents, strict=True):
        write_text(out.with_suffix(suffix), content)
    print(f"{terminal(found, models)}\n\nwrote {out}, and {', '.join(_BESIDE)} next to it")
    return 0


def _encoder(args: argparse.Namespace, path: str) -> Encoder:
    model, preprocess = load(path, args.device, _DTYPES[args.precision], **model_arguments(args))
    products = products_dtype(model.dtype, model.logit_scale.device)
    if products != model.dtype:  # the same features: the weights stay rounded
        model.set_precision(products)
        print(f"himo: note: {args.precision} weights, float32 products: faster here")
    encoder = Encoder(model, preprocess, args.batch_size, args.workers)
    if args.feature_cache:
        decisive = _decisive(args, _describe(args, encoder, path), products, encoder)
        encoder.cache = FeatureCache(args.feature_cache, decisive)
    return encoder


def _describe(args: argparse.Namespace, encoder: Encoder, path: str) -> dict[str, Any]:
    """The model: its files and every setting that changes a feature."""
    return {
        "path": path,
        "sha256": digest(path),
        "config": encoder.model.config.to_dict(),
        "precision": args.precision,
        "image_mode": encoder.preprocess.mode,
    }


def _decisive(
    args: argparse.Namespace, described: dict[str, Any], products: torch.dtype, encoder: Encoder
) -> dict[str, Any]:
    """Everything but the data on which a cached feature depends: model, program and device."""
    given = {name: value for name, value in described.items() if name != "path"}
    versions = {"himo": __version__, "torch": torch.__version__}
    arithmetic = {"products": str(products), "device": encoder.device.type}
    return given | model_arguments(args) | versions | arithmetic
