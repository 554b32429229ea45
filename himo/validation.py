"""Retrieval on held-out pairs during training."""

import torch

from himo.data import SampleIndex
from himo.errors import HimoError
from himo.evaluate.encode import Coverage, Encoder
from himo.evaluate.retrieval import RECALLS, group_by_image, retrieval
from himo.model import HiMoCLIP
from himo.transforms import Preprocess

WAYS = ("image_to_text", "text_to_image")
COLUMNS = tuple(f"val_{way}_R@{k}" for way in WAYS for k in RECALLS)  # of metrics.jsonl


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
    """

    def __init__(
        self,
        index: SampleIndex,
        preprocess: Preprocess,
        *,
        batch_size: int,
        workers: int,
        max_bad_fraction: float,
    ) -> None:
        self.index, self.preprocess = index, preprocess
        self.batch_size, self.workers = batch_size, max(1, workers)
        self.max_bad_fraction = max_bad_fraction
        self.captions = group_by_image(index, Coverage(len(index), allow_missing=True))

    def __len__(self) -> int:
        return len(self.index)

    def description(self) -> str:
        """The number of pairs, for a line on the terminal."""
        shared = self.captions.shared(self.captions.texts())
        note = f" ({shared} of them share their caption with other images)" if shared else ""
        return f"{len(self)} pairs to validate on{note}"

    def measure(self, model: HiMoCLIP) -> dict[str, float]:
        """R@1, R@5 and R@10 in percent, under the names of COLUMNS.

        Raises:
            HimoError: too many images that cannot be read, or features that are not finite.
        """
        encoder = Encoder(model, self.preprocess, self.batch_size, self.workers, progress=False)
        failed: dict[int, str] = {}

        def leave_out(image: int, reason: str, message: str) -> None:
            failed[image] = message
            if reason == "not_finite" or len(failed) > self.max_bad_fraction * len(self.index):
                raise HimoError(f"validation: {message}")

        captions = self.captions
        image_features = encoder.images(self.index, captions.image_rows, leave_out)
        if failed:
            readable = [image for image in range(len(image_features)) if image not in failed]
            captions = captions.without(set(failed), set())
            image_features = image_features[readable]
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
        return {f"val_{way}_R@{k}": result[way][f"R@{k}"] for way in WAYS for k in RECALLS}
