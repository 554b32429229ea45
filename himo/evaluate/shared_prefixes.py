"""Texts that begin alike, laid out so that the text tower computes their shared tokens once.

The tower is causal: the state of a token depends only on the tokens before it. If two texts begin
with the same tokens, these have the same states in both. A row holds several texts as a tree. Each
shared token is in the row once. The other tokens of each text follow, up to its end-of-text. Every
token sees only the earlier tokens of its own text. A caption with all its prefixes then takes
little more time than the caption alone. Tokens are compared, not characters, so texts share the
tokens up to the first difference. This may be the end of a cut text, or a last word that is encoded
differently within the caption.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TokenRows = np.ndarray[Any, np.dtype[np.uint16]]

# A row is at most as long as this many full contexts, because attention takes its square.
_CONTEXTS = 2


@dataclass
class TextBatch:
    """Texts that are encoded in one pass.

    Attributes:
        texts: int64 [T], which texts.
        sizes: how many consecutive texts each row of the batch holds; None if each is a row.
    """

    texts: np.ndarray[Any, np.dtype[np.int64]]
    sizes: list[int] | None = None


@dataclass
class SharedRows:
    """The arguments of `HiMoCLIP.encode_shared_text`, and which of its K results are texts."""

    tokens: Tensor  # int64 [B, S]
    positions: Tensor  # int64 [B, S]
    visible: Tensor  # bool [B, S, S]
    ends: Tensor  # int64 [B, K]
    is_text: Tensor  # bool [B, K]

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four arguments on a device."""
        tokens, positions = self.tokens.to(device), self.positions.to(device)
        return tokens, positions, self.visible.to(device), self.ends.to(device)


def text_batches(tokens: TokenRows, batch_size: int) -> list[TextBatch]:
    """Batches that hold each text once: those that share nothing first, from short to long.

    A batch has at most batch_size rows, and at most the tokens of batch_size texts of the full
    context.

    Args:
        tokens: [T, L], distinct rows of `tokenize` from short to long.
        batch_size: rows of a batch.
    """
    groups, lengths = _groups(tokens)
    alone = np.array(sorted(group[0] for group in groups if len(group) == 1), dtype=np.int64)
    batches = [
        TextBatch(alone[start : start + batch_size]) for start in range(0, len(alone), batch_size)
    ]
    most = batch_size * tokens.shape[1]
    together: list[list[int]] = []
    for length, group in sorted(zip(lengths, groups, strict=True)):
        if len(group) == 1:
            continue
        if together and (len(together) == batch_size or (len(together) + 1) * length > most):
            batches.append(_batch(together))
            together = []
        together.append(group)
    return batches + ([_batch(together)] if together else [])


def shared_rows(tokens: TokenRows, sizes: Iterable[int]) -> SharedRows:
    """The rows of a batch.

    Args:
        tokens: [T, L], of the texts of the batch, in its order.
        sizes: as in `TextBatch`.
    """
    stops = np.cumsum(list(sizes)).tolist()
    trees = [_Tree(tokens[start:stop]) for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
    length = max(len(tree.tokens) for tree in trees)
    most = max(len(tree.ends) for tree in trees)
    rows = SharedRows(
        torch.zeros(len(trees), length, dtype=torch.int64),
        torch.zeros(len(trees), length, dtype=torch.int64),
        torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1),
        torch.zeros(len(trees), most, dtype=torch.int64),
        torch.zeros(len(trees), most, dtype=torch.bool),
    )
    for row, tree in enumerate(trees):
        used, texts = len(tree.tokens), len(tree.ends)
        rows.tokens[row, :used] = torch.tensor(tree.tokens)
        rows.positions[row, :used] = torch.tensor(tree.positions)
        rows.visible[row, :used, :used] = torch.from_numpy(tree.visible())
        rows.ends[row, :texts] = torch.tensor(tree.ends)
        rows.is_text[row, :texts] = True
    return rows


class _Tree:
    """The tokens of sorted texts, each after its predecessor in its text."""

    def __init__(self, texts: TokenRows) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.ends: list[int] = []
        self._paths: list[list[int]] = []  # where the tokens of each text are
        path: list[int] = []
        lengths = _lengths(texts)
        # The texts are sorted, so each shares most tokens with the one just before it.
        for text, length, shared in zip(texts, lengths, _shared(texts, lengths), strict=True):
            own = range(len(self.tokens), len(self.tokens) + length - shared)
            path = [*path[:shared], *own]
            self.tokens += text[shared:length].tolist()
            self.positions += range(shared, length)
            self.ends.append(path[-1])
            self._paths.append(path)

    def visible(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        size = len(self.tokens)
        visible = np.zeros((size, size), dtype=bool)
        for path in self._paths:
            visible[np.ix_(path, path)] = np.tri(len(path), dtype=bool)
        return visible


def _batch(groups: list[list[int]]) -> TextBatch:
    texts = np.array([text for group in groups for text in group], dtype=np.int64)
    return TextBatch(texts, [len(group) for group in groups])


def _groups(tokens: TokenRows) -> tuple[list[list[int]], list[int]]:
    """Texts that share a row, in the order of their tokens, and the tokens of each row.

    A text joins the one before it if they share more than half of the shorter one.
    """
    lengths = _lengths(tokens)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    keys = np.where(inside, tokens, 0).astype(">u2")  # as bytes in the order of the numbers
    order = sorted(range(len(tokens)), key=[row.tobytes() for row in keys].__getitem__)
    ordered_lengths = lengths[order]
    groups: list[list[int]] = []
    totals: list[int] = []
    before, most = 0, _CONTEXTS * tokens.shape[1]
    for text, length, shared in zip(
        order, ordered_lengths.tolist(), _shared(tokens[order], ordered_lengths), strict=True
    ):
        near = bool(groups) and 2 * shared > min(length, before)
        if near and totals[-1] + length - shared <= most:
            groups[-1].append(text)
            totals[-1] += length - shared
        else:
            groups.append([text])
            totals.append(length)
        before = length
    return groups, totals


def _lengths(tokens: TokenRows) -> np.ndarray[Any, np.dtype[np.int64]]:
    return tokens.argmax(axis=1) + 1


def _shared(tokens: TokenRows, lengths: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    """How many tokens at its start each text shares with the text before it; 0 for the first."""
    differ = tokens[1:] != tokens[:-1]
    equal = np.where(differ.any(axis=1), differ.argmax(axis=1), tokens.shape[1])
    within = np.minimum(equal, np.minimum(lengths[1:], lengths[:-1]))
    return [0, *within.tolist()][: len(tokens)]
