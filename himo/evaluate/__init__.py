"""`himo eval`: retrieval, HiMo@K and COLA of a checkpoint, as a table and eval.json."""

import argparse
from typing import Any

import torch

from himo.checkpoint import add_model_arguments, digest, load, model_arguments
from himo.data import SampleIndex
from himo.errors import HimoError
from himo.evaluate.captions import (
    CaptionScores,
    add_data_arguments,
    data_options,
    evaluate_captions,
    open_for_evaluation,
)
from himo.evaluate.cola import cola
from himo.evaluate.encode import Coverage, Encoder
from himo.evaluate.feature_cache import FeatureCache
from himo.evaluate.himo_k import PrefixScores, himo_k, read_himo_docci, score_himo_docci
from himo.evaluate.metrics import (
    SENTENCE_RULE,
    SENTENCE_RULE_SHA256,
    growth_correlation,
    monotone_accuracy,
    recall,
    retrieval_ranks,
    segment_boundaries,
    split_sentences,
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
from himo.files import output_path
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `himo eval`."""
    parser.add_argument("--pretrained", required=True, help="checkpoint, of any format himo loads")
    add_model_arguments(parser)
    parser.add_argument("--data", help="captioned images: json, csv, tsv, jsonl, folder or tar")
    add_data_arguments(parser)
    parser.add_argument(
        "--captions-per-image",
        type=int,
        metavar="N",
        help="take the first N captions of each image and require as many: 5 for COCO, Flickr30k",
    )
    parser.add_argument("--himo-docci", metavar="FILE", help="HiMo-Docci's prefixes, JSON lines")
    parser.add_argument("--cola", metavar="FILE", help="COLA's multi-object groups, JSON")
    parser.add_argument("--out", default="eval.json", help="result (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--precision", default="fp32", choices=_DTYPES, help="of the model alone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU")
    text = "folder to keep features in, and to read those of the same model and data from"
    parser.add_argument("--feature-cache", metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table and writes the result; HimoError for what a user can mend."""
    if not (args.data or args.himo_docci or args.cola):
        raise HimoError("expected a data set to evaluate on: --data, --himo-docci or --cola")
    out = output_path(args.out)
    opened = _open(args)  # before the model: most mistakes are here
    model, preprocess = load(
        args.pretrained, args.device, _DTYPES[args.precision], **model_arguments(args)
    )
    products = products_dtype(model.dtype, model.logit_scale.device)
    if products != model.dtype:  # the same features: the weights stay rounded
        model.set_precision(products)
        print(f"himo: note: {args.precision} weights, float32 products: faster here")
    encoder = Encoder(model, preprocess, args.batch_size, args.workers)
    described = _describe(args, encoder)
    if args.feature_cache:
        encoder.cache = FeatureCache(
            args.feature_cache, _decisive(args, described, products, encoder)
        )

    # In the order of the file: sections for people first, long lists last.
    result: dict[str, Any] = {"himo_version": __version__, "model": described}
    curves: list[dict[str, Any]] = []
    chosen: dict[str, str] = {}  # how the captions of each list were
    if opened is not None:
        captions = evaluate_captions(encoder, *opened, args.captions_per_image)
        result |= captions.sections
        result["protocol"]["dataset"] = args.data  # as given, not its path on this machine
        curves, chosen["curves"] = caption_curves(captions)
        result["misses"], chosen["misses"] = caption_misses(captions)
    if args.himo_docci:
        prefixes = score_himo_docci(
            encoder, args.himo_docci, args.image_root, allow_missing=args.allow_missing
        )
        add_himo_docci(result, args.himo_docci, prefixes)
        if not curves:
            curves, chosen["curves"] = prefix_curves(prefixes)
    if args.cola:
        result["cola"] = cola(encoder, args.cola, args.image_root, allow_missing=args.allow_missing)
    result |= {"curves": curves, "chosen": chosen}
    write_result(out, result)
    print(f"{args.pretrained}\n{table(result)}\nwrote {out}")
    return 0


def _open(args: argparse.Namespace) -> tuple[SampleIndex, Coverage] | None:
    if not args.data:
        return None
    return open_for_evaluation(args.data, **data_options(args))


def _describe(args: argparse.Namespace, encoder: Encoder) -> dict[str, Any]:
    """The model: its files and every setting that changes a feature."""
    return {
        "path": args.pretrained,
        "sha256": digest(args.pretrained),
        "config": encoder.model.config.to_dict(),
        "precision": args.precision,
        "image_mode": encoder.preprocess.mode,
    }


def _decisive(
    args: argparse.Namespace, described: dict[str, Any], products: torch.dtype, encoder: Encoder
) -> dict[str, Any]:
    """What a kept feature depends on beside the data: the model, the program and the device."""
    given = {name: value for name, value in described.items() if name != "path"}
    versions = {"himo": __version__, "torch": torch.__version__}
    arithmetic = {"products": str(products), "device": encoder.device.type}
    return given | model_arguments(args) | versions | arithmetic
