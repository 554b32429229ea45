"""`himo encode`: the features of images, in a file."""

import argparse
import os
from typing import Any

from himo.apply import add_encoder_arguments, open_encoder, open_images
from himo.apply.features import SUFFIXES, About, write_features
from himo.checkpoint import digest, files_of, model_arguments
from himo.evaluate.captions import add_data_arguments, data_options
from himo.files import keep_inputs, output_path
from himo.report.runs import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `himo encode`."""
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="image files, or a folder of them, or a data set"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help=".npy or .safetensors; ids as .json"
    )
    add_encoder_arguments(parser)
    add_data_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the features of each image, L2-normalised, and their ids."""
    out = output_path(args.out, *SUFFIXES)
    reads = [*args.data, *files_of(args.pretrained)]
    keep_inputs(f"--out {out}", [out, out.with_suffix(".json")], reads)
    options = data_options(args)
    opened = open_images(args.data, **options)
    features = opened.features(open_encoder(args))
    model = {"pretrained": _absolute(args.pretrained), "sha256": digest(args.pretrained)}
    root = options["image_root"]
    data: dict[str, Any] = {
        "given": [os.path.abspath(path) for path in args.data],
        **options,
        "image_root": root and os.path.abspath(root),
    }
    about = About(opened.ids, model | model_arguments(args), data)
    write_features(out, features, about)
    rows, width = features.shape
    print(f"wrote {out}: {plural(rows, 'image')}, {width} features; {out.with_suffix('.json')}")
    return 0


def _absolute(name: str) -> str:
    """The path of a checkpoint from any directory; a name of the hub stays."""
    return os.path.abspath(name) if os.path.exists(name) else name
