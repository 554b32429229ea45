"""Image-text retrieval on a captioned set: R@1, R@5 and R@10 both ways.

Each image and each text counts once. Records with the same path are one image, and captions with
the same tokens, before any cut to the context, are one text. So every caption of an image is right
for it, and every image of a text, however many records say so. Where all captions differ this is
the retrieval of the literature. Different images or texts with the same score are ties, which count
against the model and are reported.
"""

import os
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
from himo.evaluate.metrics import ranks_and_ties, recall
from himo.tokenizer import default_tokenizer

RECALLS = (1, 5, 10)


@dataclass
class CaptionedSet:
    """The images of a data set, each once, and their captions.

    Attributes:
        image_rows: N rows of the index, one for each image.
        captions: M captions, in the order of the data set, with single spaces.
        caption_rows: the row of the index of each caption.
        caption_images: the position in image_rows of each caption's image.
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

    def texts(self) -> list[int]:
        """The number of the text of each caption, from 0 on in the order of first occurrence."""
        encode, numbers = default_tokenizer().encode, dict[tuple[int, ...], int]()
        return [
            numbers.setdefault(tuple(encode(caption)), len(numbers)) for caption in self.captions
        ]

    def shared(self, texts: Sequence[int]) -> int:
        """How many captions are texts of several images."""
        images = Counter(text for text, _ in set(zip(texts, self.caption_images, strict=True)))
        return sum(images[text] > 1 for text in texts)

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
        captions_per_image: takes this many captions of each image, the first ones, and leaves out
            images with fewer. The protocols of COCO and Flickr30k take 5.

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
        path = os.path.normpath(record.image)  # ./a.png is a.png
        rows.setdefault((record.shard, record.offset, path), []).append(row)
    chosen: list[list[int]] = []
    for caption_rows in rows.values():
        count = len(caption_rows)
        wanted = captions_per_image or count
        if count < wanted:
            where = index.describe(caption_rows[0])
            message = f"{where}: expected {wanted} captions, got {count}"
            coverage.leave_out("caption_count", message, count)
            continue
        chosen.append(caption_rows[:wanted])
        coverage.set_aside("further_captions", count - wanted)
    pairs = sorted((row, image) for image, group in enumerate(chosen) for row in group)
    return CaptionedSet(
        [group[0] for group in chosen],
        [captions[row] for row, _ in pairs],
        [row for row, _ in pairs],
        [image for _, image in pairs],
    )


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    caption_images: Sequence[int],
    caption_texts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """R@1, R@5 and R@10 in percent from images to texts and back, and the ranks.

    Image to text is a hit at k if any text of the image is among the first k, and text to image if
    any image of the text is.

    Args:
        image_features: float32 [N, E], L2-normalised.
        text_features: float32 [M, E], L2-normalised, on the same device, of M captions.
        caption_images: the row of the image of each caption; every image occurs.
        caption_texts: the number of the text of each caption, as `CaptionedSet.texts` gives it:
            captions with one number are one of U texts. By default each is one of its own, U = M.

    Returns:
        {"image_to_text": {"R@1": ...}, "text_to_image": {...},
        "chance_R@1": of one guess, in percent, the same both ways: pairs / (N U); 1 / N where
        each text has one image,
        "texts": U, "pairs": matching pairs of an image and a text,
        "ties": {"image_to_text": queries that a wrong answer ties with, "text_to_image": ...},
        "ranks": {"image_to_text": N integers, "text_to_image": U integers}}.

    Raises:
        HimoError: as `retrieval_ranks`; not as many images or texts as captions.
    """
    count = text_features.shape[0]
    numbers = range(count) if caption_texts is None else caption_texts
    for what, given in (("image", caption_images), ("text", numbers)):
        if len(given) != count:
            raise HimoError(
                f"retrieval: expected the {what} of each of {count} texts, got {len(given)}"
            )
    first: dict[int, int] = {}  # the first caption of a text
    for caption, text in enumerate(numbers):
        first.setdefault(text, caption)
    if list(first) != list(range(len(first))):
        raise HimoError("retrieval: expected caption_texts from 0 on in order of first occurrence")
    device = image_features.device
    together = sorted(set(zip(caption_images, numbers, strict=True)))
    images, texts = torch.tensor(together, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    if len(first) < count:  # otherwise a copy of all
        text_features = text_features[list(first.values())]
    ranked = {
        "image_to_text": ranks_and_ties(image_features, text_features, images, texts),
        "text_to_image": ranks_and_ties(text_features, image_features, texts, images),
    }
    result: dict[str, Any] = {
        way: {f"R@{k}": recall(ranks, k) for k in RECALLS} for way, (ranks, _) in ranked.items()
    }
    return result | {
        # The mean share of right answers, the same over images and over texts.
        "chance_R@1": 100 * (len(together) / len(first)) / image_features.shape[0],
        "texts": len(first),
        "pairs": len(together),
        "ties": {way: int(tied.sum()) for way, (_, tied) in ranked.items()},
        "ranks": {way: ranks.tolist() for way, (ranks, _) in ranked.items()},
    }
