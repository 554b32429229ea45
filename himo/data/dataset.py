"""Captioned images as tensors, and the count of the samples that could not be read."""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from himo.data.index import SampleIndex
from himo.data.tokens import TokenCache
from himo.errors import HimoError
from himo.tokenizer import TextError
from himo.transforms import ImageError, Preprocess, Reason

# What `Sample.reason` means; 0 is a good image.
REASONS: tuple[str, ...] = ("good", *get_args(Reason), TextError.reason)
# With 1 % bad samples, this many independent draws all fail once in 1e32.
_ATTEMPTS = 16
_EXAMPLES = 5  # of bad samples, in a message


class Sample(NamedTuple):
    """One sample; with a leading dimension B everywhere, a batch."""

    image: Tensor  # uint8 [3, R, R]
    tokens: Tensor  # as the tokenizer gives them [L]
    row: int | Tensor  # the requested position in the data set
    reason: int | Tensor  # position in REASONS; not 0 if another sample replaces it


class CaptionedImages(Dataset[Sample]):
    """The samples of an index, decoded, preprocessed and tokenised.

    A sample whose image or caption cannot be read is replaced by another, both image and caption,
    and `reason` says so. Seed and position alone choose the replacement: it is the same in every
    epoch, for any number of workers and after a resume. `BadSamples` counts the replaced samples
    and limits their number.

    Args:
        index: the samples.
        preprocess: its `read` makes uint8 [3, R, R] of a path or of bytes.
        tokenize: makes tokens [1, L] of a caption, as `himo.tokenize`.
        seed: of the replacements.
        short_captions: takes `caption_short` where a record has one.
        cache: gives what `tokenize` would, where it has the caption.
    """

    def __init__(
        self,
        index: SampleIndex,
        preprocess: Preprocess,
        tokenize: Callable[[str], Tensor],
        *,
        seed: int = 0,
        short_captions: bool = False,
        cache: TokenCache | None = None,
    ) -> None:
        self.index, self.preprocess, self.tokenize = index, preprocess, tokenize
        self.seed, self.short_captions, self.cache = seed, short_captions, cache

    def __len__(self) -> int:
        return len(self.index)

    def image(self, index: int) -> Tensor:
        """The image at `index`, uint8 [3, R, R]; ImageError if it cannot be read."""
        return self.preprocess.read(self.index.image_source(index))

    def tokens(self, index: int) -> Tensor:
        """The tokens of the caption at `index`, [L]; TextError if it cannot be read."""
        if self.cache is not None:
            tokens = self.cache.tokens(self.index.row(index), self.short_captions)
            if tokens is not None:
                return tokens
        record = self.index[index]
        short = self.short_captions and record.caption_short
        return self.tokenize(short or record.caption)[0]

    def replacement(self, index: int, attempt: int) -> int:
        """The sample that replaces a bad one at the attempt-th try: any but itself."""
        if len(self) == 1:
            return index
        state = struct.pack("<qqq", self.seed, index, attempt)
        number = int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little")
        other = number % (len(self) - 1)
        return other + (other >= index)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, or its replacement.

        Raises:
            HimoError: neither it nor any of 16 replacements can be read, as when a disk is gone.
        """
        reason, row = 0, index
        for attempt in range(_ATTEMPTS + 1):
            try:
                return Sample(self.image(row), self.tokens(row), index, reason)
            except (ImageError, TextError) as error:
                failure = error
                reason = reason or REASONS.index(error.reason)
                row = self.replacement(index, attempt)
        raise HimoError(
            f"{_ATTEMPTS + 1} samples tried one after the other cannot be read, the last: {failure}"
        )


class BadSamples:
    """Counts the samples that could not be read, from the batches that the main process gets.

    Each position counts once in all epochs. In a run of several processes each one counts its own
    samples.

    Args:
        index: the samples, for messages.
        max_bad_fraction: the largest fraction of them that may be bad.
    """

    def __init__(self, index: SampleIndex, max_bad_fraction: float = 0.01) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise HimoError(f"max_bad_fraction: expected 0 to 1, got {max_bad_fraction}")
        self.index, self.max_bad_fraction = index, max_bad_fraction
        self.reasons: dict[int, str] = {}  # of each bad position, in the order met

    def update(self, batch: Sample) -> None:
        """Counts the bad samples of a batch.

        Raises:
            HimoError: there are now more than the limit.
        """
        reason = torch.as_tensor(batch.reason)
        if not reason.any():
            return
        rows = torch.as_tensor(batch.row)[reason != 0].tolist()
        for row, code in zip(rows, reason[reason != 0].tolist(), strict=True):
            self.reasons.setdefault(row, REASONS[code])
        if len(self.reasons) > self.max_bad_fraction * len(self.index):
            limit = f"the limit is {100 * self.max_bad_fraction:g} % (--max-bad-fraction)"
            raise HimoError(f"too many bad samples, {limit}: {self.summary()}")

    def counts(self) -> dict[str, int]:
        """How many positions are bad, by reason."""
        found = Counter(self.reasons.values())
        return {reason: found[reason] for reason in REASONS if reason in found}

    def summary(self) -> str:
        """One line: how many by reason, and where the first of them are."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.counts().items())
        first = ", ".join(self.index.describe(index) for index in list(self.reasons)[:_EXAMPLES])
        total = f"{len(self.reasons)} of {len(self.index)} samples could not be read"
        return f"{total} ({counts}); first: {first}" if self.reasons else total

    def state_dict(self) -> dict[str, Any]:
        return {"reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        reasons = {int(index): str(reason) for index, reason in state["reasons"].items()}
        if any(not 0 <= index < len(self.index) for index in reasons):
            raise HimoError(f"resume: bad images beyond the {len(self.index)} samples")
        self.reasons = reasons
