"""`himo pack`: training data as shards of small images, which read faster."""

import argparse

from himo import config
from himo.data import open_dataset
from himo.data.packing import FORMATS, PackOptions, bad_images, pack
from himo.errors import HimoError, note
from himo.flags import flag
from himo.parallel import Ranks
from himo.training_data import open_data

# The flags of `himo train` that decide how the data are read.
_FLAGS = (
    *("dataset_type", "image_root", "csv_separator", "csv_img_key", "csv_caption_key"),
    *("skip_missing_images", "follow_links", "max_bad_fraction", "image_mode", "workers"),
)
_RANGES = {"size": (16, 4096), "quality": (1, 100), "shard_pairs": (1, 1_000_000)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the data, the output folder, the options of shards, and the flags for reading data."""
    default = PackOptions()
    parser.add_argument("data", metavar="DATA", help="data set, as --train-data of himo train")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument(
        "--size",
        type=int,
        default=default.size,
        metavar="N",
        help=f"pixels of the short side; smaller images stay (default: {default.size})",
    )
    parser.add_argument(
        "--format", choices=tuple(FORMATS), default=default.format, help="default: jpeg"
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=default.quality,
        metavar="Q",
        help=f"of the images, 1 to 100 (default: {default.quality})",
    )
    parser.add_argument(
        "--shard-pairs",
        type=int,
        default=default.shard_pairs,
        metavar="N",
        help=f"pairs of a shard (default: {default.shard_pairs})",
    )
    config.add_arguments(parser, _FLAGS)


def run(args: argparse.Namespace) -> int:
    """Writes the missing shards and their index; prints their contents; returns 0."""
    settings = config.from_arguments(args, train_data=args.data)
    for name, (low, high) in _RANGES.items():
        if not low <= getattr(args, name) <= high:
            raise HimoError(f"{flag(name)}: expected {low} to {high}, got {getattr(args, name)}")
    options = PackOptions(
        args.size, args.format, args.quality, settings.image_mode, args.shard_pairs
    )
    index, _ = open_data(settings, Ranks())
    packed = pack(
        index,
        args.out,
        options,
        workers=settings.workers,
        max_bad_fraction=settings.max_bad_fraction,
    )
    if packed.bad:
        note(f"{args.out}: left out: {bad_images(packed.bad, len(index), packed.examples)}")
    print(open_dataset(args.out).report.summary())  # and its index, for the first training
    resumed = f", {packed.resumed} of them there before" if packed.resumed else ""
    print(
        f"{args.out}: {packed.pairs} pairs in {packed.shards} shards{resumed}, "
        f"{packed.size / packed.pairs / 1024:.1f} KiB a pair"
    )
    return 0
