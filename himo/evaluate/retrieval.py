"""Image-text retrieval on a captioned set: R@1, R@5 and R@10 both ways."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo.data import SampleIndex
from himo.data.records import RecordError, check_encodable
from himo.errors import HimoError
from himo.evaluate.encode import Coverage
from himo.evaluate.metrics import recall, retrieval_ranks

RECALLS = (1, 5, 10)


@dataclass
class CaptionedSet:
    """The images of a data set, each once, and their captions.

    Attributes:
        image_rows: N rows of the index, one for each image.
        captions: M captions, in the order of the data set, with single spaces.
        caption_rows: the row of the index that each caption is from.
        caption_images: the position in image_rows that each caption belongs to.
    """

    image_rows: list[int]
    captions: list[str]
    caption_rows: list[int]
    caption_images: list[int]

    def without(self, images: set[int], captions: set[int]) -> "CaptionedSet":
        """The set without some images and captions, by position, and images left with none."""
        keep = [
            caption
            for caption, image in enumerate(self.caption_images)
            if caption not in captions and image not in images
        ]
        left = sorted({self.caption_images[caption] for caption in keep})
        position = {image: new for new, image in enumerate(left)}
        return CaptionedSet(
            [self.image_rows[image] for image in left],
            [self.captions[caption] for caption in keep],
            [self.caption_rows[caption] for caption in keep],
            [position[self.caption_images[caption]] for caption in keep],
        )

    def positives(self) -> str:
        """How many captions an image has, for the record of the protocol."""
        counts = Counter(self.caption_images).values()
        low, high = min(counts), max(counts)
        number = str(low) if low == high else f"{low} to {high}"
        return f"{number} caption{'' if high == 1 else 's'} per image"


def group_by_image(
    index: SampleIndex, coverage: Coverage, captions_per_image: int | None = None
) -> CaptionedSet:
    """Gathers the captions of each image: records with the same path are one image.

    Args:
        index: the records.
        coverage: counts records that are left out.
        captions_per_image: takes the first so many captions of each image, as the protocols of
            COCO and Flickr30k do with 5, and leaves out images with fewer.

    Raises:
        HimoError: an image has fewer captions than that, unless `coverage` allows it.
    """
    if captions_per_image is not None and captions_per_image < 1:
        raise HimoError(f"captions_per_image: expected at least 1, got {captions_per_image}")
    rows: dict[tuple[int, int, str], list[int]] = {}
    captions = []
    for row in range(len(index)):
        record = index[row]
        captions.append(" ".join(record.caption.split()))
        try:
            check_encodable(captions[-1:])
        except RecordError as error:
            coverage.leave_out(error.reason, f"{index.describe(row)}: {error}")
            continue
        rows.setdefault((record.shard, record.offset, record.image), []).append(row)
    chosen: list[list[int]] = []
    for caption_rows in rows.values():
        wanted = captions_per_image or len(caption_rows)
        if len(caption_rows) < wanted:
            coverage.leave_out(
                "caption_count",
                f"{index.describe(caption_rows[0])}: expected {wanted} captions, got "
                f"{len(caption_rows)}",
                len(caption_rows),
            )
            continue
        chosen.append(caption_rows[:wanted])
        coverage.set_aside("further_captions", len(caption_rows) - wanted)
    pairs = sorted((row, image) for image, group in enumerate(chosen) for row in group)
    return CaptionedSet(
        [group[0] for group in chosen],
        [captions[row] for row, _ in pairs],
        [row for row, _ in pairs],
        [image for _, image in pairs],
    )


def retrieval(
    image_features: Tensor, text_features: Tensor, caption_images: Sequence[int]
) -> dict[str, Any]:
    """R@1, R@5 and R@10 in percent from images to texts and back, and the ranks.

    Image to text is a hit at k if any caption of the image is among the first k.

    Args:
        image_features: float32 [N, E], L2-normalised.
        text_features: float32 [M, E], L2-normalised, on the same device.
        caption_images: the row of the image of each of the M texts; every image occurs.

    Returns:
        {"image_to_text": {"R@1": ...}, "text_to_image": {...}, "chance_R@1": 100 / N,
        "ranks": {"image_to_text": N integers, "text_to_image": M integers}}.

    Raises:
        HimoError: as `retrieval_ranks`; not as many positives as texts.
    """
    if len(caption_images) != text_features.shape[0]:
        raise HimoError(
            f"retrieval: expected the image of each of {text_features.shape[0]} texts, got "
            f"{len(caption_images)}"
        )
    images = torch.tensor(caption_images, dtype=torch.int64, device=image_features.device)
    texts = torch.arange(len(images), device=images.device)
    ranks = {
        "image_to_text": retrieval_ranks(image_features, text_features, images, texts),
        "text_to_image": retrieval_ranks(text_features, image_features, texts, images),
    }
    result: dict[str, Any] = {
        way: {f"R@{k}": recall(rank, k) for k in RECALLS} for way, rank in ranks.items()
    }
    # The mean over images of their captions' share of all texts is 1 / N too.
    result["chance_R@1"] = 100 / image_features.shape[0]
    result["ranks"] = {way: rank.tolist() for way, rank in ranks.items()}
    return result
