"""Uses of a trained model: `himo encode`, `himo search` and `himo classify`.

This module holds the parts they share: flags, the images that a user names, features of texts.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo.checkpoint import add_model_arguments, load, model_arguments
from himo.data import SampleIndex
from himo.data.folder import IMAGE_SUFFIXES
from himo.data.paths import ImageRoot
from himo.data.webdataset import is_shard
from himo.errors import HimoError, note
from himo.evaluate.captions import open_for_evaluation
from himo.evaluate.encode import Coverage, Encoder, GivenFiles, ImageFiles, Images
from himo.evaluate.result import thumbnail
from himo.evaluate.retrieval import group_by_image
from himo.progress import passing_bar
from himo.report.runs import plural
from himo.transforms import ImageError


@dataclass
class Opened:
    """Images that a user names.

    Attributes:
        images: where they come from.
        rows: which of them, each image once.
        ids: a name of each row: its path, as given or below the folder or image root; in a shard
            after the shard's name.
        coverage: what is left out.
    """

    images: Images
    rows: list[int]
    ids: list[str]
    coverage: Coverage

    def features(self, encoder: Encoder) -> Tensor:
        """Features [len(rows), E] as `Encoder.images`, without the images that cannot be read.

        Removes these from rows and ids.

        Raises:
            HimoError: an image cannot be read, unless `coverage` allows it; or none can.
        """
        failed: set[int] = set()

        def leave_out(position: int, reason: str, message: str) -> None:
            self.coverage.leave_out(reason, message)
            failed.add(position)

        features = encoder.images(self.images, self.rows, leave_out)
        if failed and len(failed) == len(self.rows):
            first = self.coverage.examples[0]
            raise HimoError(f"none of the {plural(len(failed), 'image')} can be used: {first}")
        left = [position for position in range(len(self.rows)) if position not in failed]
        self.rows = [self.rows[position] for position in left]
        self.ids = [self.ids[position] for position in left]
        for reason, count in self.coverage.left_out.items():
            note(f"left out: {count:,} {reason.replace('_', ' ')}")
        return features[left]

    def thumbnails(self, positions: Sequence[int]) -> list[str | None]:
        """The images at positions of rows as data URLs; None for one that cannot be read."""
        return [self._thumbnail(position) for position in passing_bar(positions, "thumbnails")]

    def _thumbnail(self, position: int) -> str | None:
        try:
            return thumbnail(self.images, self.rows[position])
        except ImageError:
            return None


def open_images(given: Sequence[str], *, allow_missing: bool, **options: Any) -> Opened:
    """The images of files, of a folder, or of a captioned data set.

    Args:
        given: image files, or one folder or data set. A folder with shards, or with a text file of
            the name of an image, is a data set; in any other every image at any depth counts.
        allow_missing: leaves out, and counts, what cannot be read.
        options: of `himo.data.open_dataset`, for a data set.

    Raises:
        HimoError: there is no image, or as `open_dataset`.
    """
    if all(_is_image(path) for path in given):
        files = GivenFiles(given)
        return Opened(files, [*range(len(given))], [*given], Coverage(len(given), allow_missing))
    if len(given) > 1:
        wrong = next(path for path in given if not _is_image(path))
        raise HimoError(f"{wrong}: expected image files, or one folder or data set")
    (source,) = given
    names = _loose_images(source) if os.path.isdir(source) else None
    if names is not None:
        if not names:
            raise HimoError(f"{source}: expected images in the folder, found none")
        below = ImageFiles(ImageRoot(source), names, [source] * len(names))
        return Opened(below, [*range(len(names))], names, Coverage(len(names), allow_missing))
    index, coverage = open_for_evaluation(source, allow_missing=allow_missing, **options)
    coverage.check(source)
    rows = group_by_image(index, coverage).image_rows
    return Opened(index, rows, [_id(index, row) for row in rows], coverage)


def _id(index: SampleIndex, row: int) -> str:
    record, origin = index[row], index.origin
    if origin is None or record.shard < 0:
        return record.image
    return f"{os.path.basename(origin.shards[record.shard])}/{record.image}"


def _is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES and not os.path.isdir(path)


def _loose_images(folder: str) -> list[str] | None:
    """The images below a folder, sorted; None if the folder is a data set with captions."""
    found: list[str] = []
    texts: set[str] = set()
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            stem, suffix = os.path.splitext(name)
            if is_shard(name):
                return None
            if suffix.lower() == ".txt":
                texts.add(stem)
            elif suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                found.append(os.path.relpath(os.path.join(directory, name), folder))
    if any(os.path.splitext(os.path.basename(name))[0] in texts for name in found):
        return None
    return sorted(found)


def add_encoder_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds the flags of the model and of the batches; `open_encoder` reads them."""
    parser.add_argument(
        "--pretrained", required=required, metavar="CKPT", help="checkpoint himo loads, or its name"
    )
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode images")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N; auto takes a GPU")


def open_encoder(args: argparse.Namespace) -> Encoder:
    """The encoder of the flags of `add_encoder_arguments`."""
    model, preprocess = load(args.pretrained, args.device, **model_arguments(args))
    return Encoder(model, preprocess, args.batch_size, args.workers)


def text_features(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Features [len(texts), E] of texts, L2-normalised, float32 on the CPU.

    Raises:
        HimoError: features that are not finite.
    """
    no_pair = torch.empty(0, dtype=torch.int64)
    no_image = torch.empty(0, encoder.model.config.embed_dim)
    scored = encoder.score_texts(texts, no_pair, no_pair, no_image, len(texts))
    if scored.not_finite.any():
        raise HimoError("the features of a text are not finite")
    if scored.cut:
        length = encoder.model.context_length
        note(f"{plural(scored.cut, 'text is', 'texts are')} longer than {length} tokens and cut")
    return scored.features
