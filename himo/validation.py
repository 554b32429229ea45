"""Retrieval on held-out pairs during training, and the best of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from himo.data import SampleIndex
from himo.errors import HimoError, shortened
from himo.evaluate.captions import score_prefixes
from himo.evaluate.encode import Coverage, Encoder
from himo.evaluate.himo_k import himo_at
from himo.evaluate.retrieval import RECALLS, CaptionedSet, group_by_image, retrieval
from himo.model import HiMoCLIP
from himo.transforms import Preprocess

WAYS = ("image_to_text", "text_to_image")
_FOLLOWED, _CHARACTERS = 4, 200  # images, and characters of a caption, in metrics.jsonl
_SEGMENTS = (2, 3)  # of HiMo@2 and HiMo@3
# Of metrics.jsonl.
COLUMNS = (
    *(f"val_{way}_R@{k}" for way in WAYS for k in RECALLS),
    *(f"val_HiMo@{k}" for k in _SEGMENTS),
)


@dataclass
class Best:
    """The best validation of a run by R@1, the mean of both directions in percent.

    Step 0 means that there is none yet. `since` counts the validations after the best one.
    """

    step: int = 0
    epoch: float = 0.0
    score: float = -1.0
    since: int = 0

    def is_beaten(self, step: int, epoch: float, values: dict[str, float | None]) -> bool:
        """Counts a validation, the values of `Validation.measure`; True if it is the best now."""
        score = sum(values[f"val_{way}_R@1"] or 0.0 for way in WAYS) / len(WAYS)
        if score <= self.score:
            self.since += 1
            return False
        self.step, self.epoch, self.score, self.since = step, epoch, score, 0
        return True

    def description(self) -> str:
        """Words for a line on the terminal."""
        return f"best after epoch {self.epoch:g}, R@1 {self.score:.1f} %"


def predictions(
    images: Tensor, texts: Tensor, captions: CaptionedSet, index: SampleIndex
) -> list[dict[str, Any]]:
    """The captions that the model ranks first for a few images, to compare validations.

    Args:
        images: features of the images of captions, [N, E], L2-normalised.
        texts: features of its captions, [M, E].

    Returns:
        For each image: its path, its first caption, the rank of this caption among all captions
        (from 1), and the caption that fits best.
    """
    found = []
    for image, scores in enumerate(images[:_FOLLOWED] @ texts.T):
        own = captions.caption_images.index(image)
        found.append(
            {
                "image": index[captions.image_rows[image]].image,
                "caption": shortened(captions.captions[own], _CHARACTERS),
                "rank": 1 + int((scores > scores[own]).sum()),
                "best": shortened(captions.captions[int(scores.argmax())], _CHARACTERS),
            }
        )
    return found


class Validation:
    """Computes the recalls of a model on an index, as `himo eval` does.

    Draws no random number and changes nothing in the model, so a run has the same weights with and
    without it. Images that cannot be read are left out.

    Args:
        index: the held-out pairs.
        preprocess: the model's.
        batch_size: images or texts at a time.
        workers: threads that decode images.
        max_bad_fraction: the largest fraction of records that may be left out.
        with_himo: also measures HiMo@2 and HiMo@3.
    """

    def __init__(
        self,
        index: SampleIndex,
        preprocess: Preprocess,
        *,
        batch_size: int,
        workers: int,
        max_bad_fraction: float,
        with_himo: bool = False,
    ) -> None:
        self.index, self.preprocess = index, preprocess
        self.batch_size, self.workers = batch_size, max(1, workers)
        self.max_bad_fraction, self.with_himo = max_bad_fraction, with_himo
        self.predictions: list[dict[str, Any]] = []
        self.captions = group_by_image(index, Coverage(len(index), allow_missing=True))

    def __len__(self) -> int:
        return len(self.index)

    def description(self) -> str:
        """The number of pairs, for a line on the terminal."""
        shared = self.captions.shared(self.captions.texts())
        note = f" ({shared} of them share their caption with other images)" if shared else ""
        return f"{len(self)} pairs to validate on{note}"

    def measure(self, model: HiMoCLIP) -> dict[str, float | None]:
        """Percentages under the names of COLUMNS: R@1, R@5, R@10, and HiMo@2 and HiMo@3 if wanted.

        HiMo@K is None if no caption has K sentences.

        Raises:
            HimoError: too many images that cannot be read, or features that are not finite.
        """
        encoder = Encoder(model, self.preprocess, self.batch_size, self.workers, progress=False)
        failed: dict[int, str] = {}

        def leave_out(image: int, reason: str, message: str) -> None:
            failed[image] = message
            if reason == "not_finite":
                raise HimoError(f"validation: {message}")
            if len(failed) > self.max_bad_fraction * len(self.index):
                limit = f"the limit is {100 * self.max_bad_fraction:g} % (--max-bad-fraction)"
                raise HimoError(f"validation: too many bad samples, {limit}: {message}")

        captions = self.captions
        image_features = encoder.images(self.index, captions.image_rows, leave_out)
        if failed:
            readable = [image for image in range(len(image_features)) if image not in failed]
            captions = captions.without(set(failed), set())
            image_features = image_features[readable]
        himo: dict[str, float | None] = {}
        if self.with_himo:
            series, scored, _ = score_prefixes(encoder, captions, image_features)
            himo = {f"val_HiMo@{k}": himo_at(series, k)["value"] for k in _SEGMENTS}
        else:
            texts, no_pair = captions.captions, torch.empty(0, dtype=torch.int64)
            scored = encoder.score_texts(texts, no_pair, no_pair, image_features, len(texts))
        if scored.not_finite.any():
            raise HimoError("validation: features of a caption are not finite")
        device = encoder.device
        result = retrieval(
            image_features.to(device),
            scored.features.to(device),
            captions.caption_images,
            captions.texts(),
        )
        self.chance = result["chance_R@1"]
        self.predictions = predictions(image_features, scored.features, captions, self.index)
        return {f"val_{way}_R@{k}": result[way][f"R@{k}"] for way in WAYS for k in RECALLS} | himo

    def line(self, values: dict[str, float | None]) -> str:
        """The result of `measure` for a line on the terminal."""
        ways = (f"{values[f'val_{way}_R@1']:.1f} % {way.replace('_', ' ')}" for way in WAYS)
        shown = f"R@1 {', '.join(ways)} (chance {self.chance:.2g} %)"
        for k in _SEGMENTS if self.with_himo else ():
            value = values[f"val_HiMo@{k}"]
            shown += f", HiMo@{k} {'–' if value is None else f'{value:.1f} %'}"
        return shown
