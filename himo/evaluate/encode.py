"""Features of images and texts, a batch at a time, and a count of what could not be used."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from himo.data.paths import ImageRoot, MissingImage
from himo.data.records import RecordError
from himo.errors import HimoError
from himo.evaluate.feature_cache import FeatureCache
from himo.evaluate.metrics import nonfinite_rows
from himo.evaluate.shared_prefixes import TextBatch, TokenRows, shared_rows, text_batches
from himo.files import sha256_file
from himo.model import HiMoCLIP
from himo.progress import passing_bar
from himo.tokenizer import default_tokenizer
from himo.transforms import ImageError, Preprocess, Reason

_EXAMPLES = 5  # of what was left out
_TOKENIZED = 4096  # texts at a time
_SCORED = 4096  # rows of features from a cache at a time


@dataclass
class Coverage:
    """How much of a data set took part, and why the rest did not.

    Args:
        total: items there are.
        allow_missing: counts what cannot be used; otherwise the first of it is an error.
    """

    total: int
    allow_missing: bool
    left_out: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def used(self) -> int:
        return self.total - sum(self.left_out.values())

    def leave_out(self, reason: str, message: str, count: int = 1) -> None:
        """Counts `count` items; HimoError with the message unless that is allowed."""
        if not self.allow_missing:
            raise HimoError(f"{message}; --allow-missing uses the rest and counts it")
        self.left_out[reason] = self.left_out.get(reason, 0) + count
        if len(self.examples) < _EXAMPLES:
            self.examples.append(message)

    def set_aside(self, reason: str, count: int) -> None:
        """Counts items that the protocol does not use, and that are no fault."""
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count

    def check(self, source: str) -> None:
        """HimoError if nothing is left."""
        if self.used == 0:
            first = f", the first: {self.examples[0]}" if self.examples else ""
            raise HimoError(f"{source}: none of {self.total} can be evaluated{first}")

    def to_dict(self) -> dict[str, Any]:
        """The section of eval.json."""
        left_out, examples = dict(self.left_out), list(self.examples)
        return {"used": self.used, "total": self.total, "left_out": left_out, "examples": examples}


class Images(Protocol):
    """Where images come from; `himo.data.SampleIndex` is one."""

    def image_source(self, index: int, /) -> str | bytes:
        """A path or the bytes of a file; ImageError if there is none."""

    def describe(self, index: int, /) -> str:
        """Its place in the data set, for a message."""


@dataclass
class GivenFiles:
    """Image files that the user names."""

    paths: Sequence[str]

    def image_source(self, index: int, /) -> str:
        return self.paths[index]

    def describe(self, index: int, /) -> str:
        return f"image {index + 1}"  # every error has the path itself


@dataclass
class ImageFiles:
    """Images below a root; `places` are where a file names them, for messages."""

    root: ImageRoot
    names: Sequence[str]
    places: Sequence[str]

    def image_source(self, index: int, /) -> str:
        try:
            return self.root.resolve(self.names[index])
        except RecordError as error:
            reason: Reason = "missing" if isinstance(error, MissingImage) else "not_a_file"
            raise ImageError(str(error), reason) from error

    def describe(self, index: int, /) -> str:
        return f"{self.places[index]}: {self.names[index]}"


@dataclass
class Encoder:
    """A model, and how to feed it.

    Args:
        model: the model; its device is the one used.
        preprocess: its preprocessing.
        batch_size: images or texts at a time.
        workers: threads that decode images.
        progress: shows a bar for what takes more than 2 seconds.
        cache: stores features for the next evaluation; None stores none.
    """

    model: HiMoCLIP
    preprocess: Preprocess
    batch_size: int = 64
    workers: int = 2
    progress: bool = True
    cache: FeatureCache | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "workers"):
            if getattr(self, name) < 1:
                raise HimoError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def images(
        self, images: Images, rows: Sequence[int], failed: Callable[[int, str, str], None]
    ) -> Tensor:
        """L2-normalised features [len(rows), E] of some images, float32 on the CPU.

        Args:
            images: where they come from.
            rows: which of them.
            failed: is told the position in `rows`, the reason and a message of each image without
                features; its row is NaN.
        """
        data = self.cache and _digest_of_images(images, rows)
        shape = len(rows), self.model.config.embed_dim
        if self.cache and data and (cached := self.cache.read("images", data, shape)) is not None:
            return cached
        features = torch.full(shape, torch.nan)
        with torch.no_grad(), self._bar("images", len(rows)) as bar:
            for positions, pixels in self._decoded(images, rows, failed):
                if positions:
                    batch = self.preprocess.normalize(torch.stack(pixels).to(self.device))
                    encoded = _normalized(self.model.encode_image(batch))
                    for wrong in nonfinite_rows(encoded):
                        where = images.describe(rows[positions[wrong]])
                        failed(positions[wrong], "not_finite", f"{where}: features are not finite")
                        encoded[wrong] = torch.nan
                    features[positions] = encoded
                bar.update(min(self.batch_size, len(rows) - bar.n))
        if self.cache and data:
            self.cache.write("images", data, features)
        return features

    def score_texts(
        self,
        texts: Sequence[str],
        pair_text: Tensor,
        pair_image: Tensor,
        image_features: Tensor,
        wanted: int,
    ) -> "TextScores":
        """Cosine similarities of pairs of a text and an image, and the features of some texts.

        Texts with the same tokens are encoded once, and so have the same score. Texts that begin
        alike share a row, as `shared_prefixes` lays them out. Rows are sorted by length, because a
        batch takes as long as its longest row.

        Args:
            texts: T texts.
            pair_text: int64 [P], from 0 to T - 1.
            pair_image: int64 [P], rows of image_features.
            image_features: float32 [N, E] on the CPU, L2-normalised.
            wanted: the features of texts[:wanted] are returned.
        """
        tokens, row_of_text, cut = distinct_tokens(texts, self.model.context_length)
        batches = text_batches(tokens, self.batch_size)
        # From here on rows are numbered in the order they are encoded in.
        order = np.concatenate([batch.texts for batch in batches] or [np.arange(0)])
        row_of_text = torch.from_numpy(order).argsort()[row_of_text]
        scores = torch.empty(len(pair_text))
        features = torch.empty(wanted, self.model.config.embed_dim)
        bad_row = torch.zeros(len(tokens), dtype=torch.bool)
        pair_row, pair_order = row_of_text[pair_text].sort()
        wanted_row, wanted_order = row_of_text[:wanted].sort()
        with torch.no_grad(), self._bar("texts", len(tokens)) as bar:
            stop = 0
            for encoded in self._encoded(tokens, batches, order):
                start, stop = stop, stop + len(encoded)
                bad_row[[start + row for row in nonfinite_rows(encoded)]] = True
                pairs = _between(pair_row, start, stop)
                chosen = image_features[pair_image[pair_order[pairs]]]
                scores[pair_order[pairs]] = (chosen * encoded[pair_row[pairs] - start]).sum(dim=1)
                texts_here = _between(wanted_row, start, stop)
                features[wanted_order[texts_here]] = encoded[wanted_row[texts_here] - start]
                bar.update(stop - start)
        return TextScores(scores, features, bad_row[row_of_text], cut)

    def _encoded(
        self, tokens: TokenRows, batches: Sequence[TextBatch], order: "np.ndarray[Any, Any]"
    ) -> Iterator[Tensor]:
        """Yields the features of tokens[order], some consecutive rows at a time."""
        if self.cache is None:
            for batch in batches:
                yield self.encode_batch(tokens[batch.texts], batch)
            return
        data = hashlib.sha256(tokens.tobytes()).hexdigest()
        cached = self.cache.read("texts", data, (len(tokens), self.model.config.embed_dim))
        if cached is not None:
            for start in range(0, len(order), _SCORED):
                yield cached[order[start : start + _SCORED]]
            return
        features = torch.empty(len(tokens), self.model.config.embed_dim)
        for batch in batches:
            features[batch.texts] = encoded = self.encode_batch(tokens[batch.texts], batch)
            yield encoded
        self.cache.write("texts", data, features)

    def encode_batch(self, tokens: TokenRows, batch: TextBatch) -> Tensor:
        """L2-normalised features [T, E] of a batch, float32 on the CPU.

        Args:
            tokens: [T, L], of the texts of the batch, in its order.
            batch: one of `text_batches`.
        """
        if batch.sizes is None:
            return self._encode_tokens(tokens)
        rows = shared_rows(tokens, batch.sizes)
        encoded = self.model.encode_shared_text(*rows.to(self.device))
        encoded = _normalized(encoded[rows.is_text.to(self.device)])
        # A token that is NaN makes the whole row so: 0 times NaN, where it is not seen.
        bad = nonfinite_rows(encoded)
        for start in range(0, len(bad), self.batch_size):
            alone = bad[start : start + self.batch_size]
            encoded[alone] = self._encode_tokens(tokens[alone])
        return encoded

    def _encode_tokens(self, tokens: TokenRows) -> Tensor:
        longest = int(tokens.argmax(axis=1).max()) + 1
        batch = torch.from_numpy(tokens[:, :longest].astype(np.int32)).to(self.device)
        return _normalized(self.model.encode_text(batch, max_length=longest))

    def _decoded(
        self, images: Images, rows: Sequence[int], failed: Callable[[int, str, str], None]
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Yields batches of positions in `rows` and uint8 [3, R, R]; one batch is read ahead."""
        order = range(len(rows))
        pool = ThreadPoolExecutor(self.workers)
        submitted = (
            [
                (at, self._submit(pool, images, rows[at]))
                for at in order[start : start + self.batch_size]
            ]
            for start in order[:: self.batch_size]
        )
        try:
            ahead = next(submitted, None)
            while ahead is not None:
                batch, ahead = ahead, next(submitted, None)
                positions, pixels = [], []
                for at, future in batch:
                    try:
                        if isinstance(future, ImageError):
                            raise future
                        pixels.append(future.result())
                        positions.append(at)
                    except ImageError as error:
                        failed(at, error.reason, f"{images.describe(rows[at])}: {error}")
                yield positions, pixels
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, images: Images, row: int
    ) -> Future[Tensor] | ImageError:
        # Only decoding runs in the threads: the index shares descriptors of shards.
        try:
            return pool.submit(self.preprocess.read, images.image_source(row))
        except ImageError as error:
            return error

    def _bar(self, what: str, total: int) -> "tqdm[Any]":
        unit = what.removesuffix("s")
        return passing_bar(None, f"encoding {what}", unit, total=total, shown=self.progress)


@dataclass
class TextScores:
    """The result of `Encoder.score_texts`.

    Attributes:
        scores: float32 [P], cosine similarity of each pair.
        features: float32 [wanted, E], L2-normalised.
        not_finite: bool [T], texts whose features are not finite.
        cut: texts, each counted once, that are longer than the model's context.
    """

    scores: Tensor
    features: Tensor
    not_finite: Tensor
    cut: int


def distinct_tokens(texts: Sequence[str], context_length: int) -> tuple[TokenRows, Tensor, int]:
    """The distinct token rows from short to long, the row of each text, and how many were cut.

    Returns:
        uint16 [U, context_length], int64 [T], and how many different texts are longer than the
        context.
    """
    tokenizer = default_tokenizer()
    rows: dict[bytes, int] = {}
    row_of_text = np.empty(len(texts), dtype=np.int64)
    cut: set[str] = set()
    for start in range(0, len(texts), _TOKENIZED):
        part = list(texts[start : start + _TOKENIZED])
        ids, too_long = tokenizer.encode_cut(part, context_length)
        cut.update(part[offset] for offset, _ in too_long)
        for offset, row in enumerate(ids):
            row_of_text[start + offset] = rows.setdefault(row.tobytes(), len(rows))
    tokens = np.frombuffer(b"".join(rows), dtype=np.uint16).reshape(len(rows), context_length)
    order = tokens.argmax(axis=1).argsort(kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return tokens[order], torch.from_numpy(rank[row_of_text]), len(cut)


def _digest_of_images(images: Images, rows: Sequence[int]) -> str | None:
    """The SHA-256 of the SHA-256 of each image's file; None if one cannot be read."""
    digest = hashlib.sha256()
    for row in rows:
        try:
            source = images.image_source(row)
            one = sha256_file(source) if isinstance(source, str) else hashlib.sha256(source)
        except (ImageError, HimoError):
            return None  # decoding the image will raise an error with the reason
        digest.update((one if isinstance(one, str) else one.hexdigest()).encode())
    return digest.hexdigest()


def _normalized(features: Tensor) -> Tensor:
    """L2-normalised rows in float32 on the CPU, whatever dtype the model computes in."""
    return F.normalize(features.float(), dim=-1).cpu()


def _between(values: Tensor, start: int, stop: int) -> slice:
    """Where sorted `values` are from start to stop - 1."""
    first, last = torch.searchsorted(values, torch.tensor([start, stop])).tolist()
    return slice(first, last)
