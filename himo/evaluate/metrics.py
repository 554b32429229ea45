"""Retrieval ranks and HiMo@K as functions of features and scores: no model, no file.

Scores are compared in float32 whatever computed the features. On a hard synthetic set, scores in
float16 tie at the top for 1.7 % of the queries and in bfloat16 for 13 %, and HiMo@3 falls from 52.4
(float64) to 51.4 and 45.1.
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from himo.errors import HimoError
from himo.evaluate.sentences import split_sentences
from himo_kernels.process_state import full_float32

# Most parts of a caption whose prefixes are scored. The time grows with the square of their number,
# and a caption of 8 KB may have 2,700 sentences. A multiple of 2 and 3: HiMo@2 and HiMo@3 do not
# change.
MAX_SEGMENTS = 120

_TILE_BYTES = 32 << 20  # of scores at a time
_MAX_CANDIDATES = 1 << 24  # as far as float32 counts


def retrieval_ranks(
    queries: Tensor,  # [Q, D]
    candidates: Tensor,  # [M, D]
    positive_query: Tensor,  # [P]
    positive_candidate: Tensor,  # [P]
    *,
    tile_bytes: int = _TILE_BYTES,
) -> Tensor:
    """The rank of each query's best positive among all candidates that are not its positives, [Q].

    Equal to 1 + #{j : queries_i . candidates_j >= s_i}, j no positive of i, where s_i is the
    largest score of a positive. So a tie counts against the model, and a query is a hit at k, with
    any of its positives, where its rank is at most k.

    Scores are computed for a block of queries at a time, so no [Q, M] matrix is formed. s_i is
    read from the same product as its competitors: a separate dot product is rounded differently,
    and a positive can then lose to itself (R@1 62.8 instead of 99.8, measured). Candidates that
    are equal bit for bit get equal scores.

    Args:
        queries: float32, L2-normalised rows for cosine similarity.
        candidates: float32, on the same device.
        positive_query: int64, in any order; every query occurs.
        positive_candidate: int64; query positive_query[p] and candidate positive_candidate[p]
            belong together. No pair comes twice.
        tile_bytes: of the scores in memory at a time; at least one row of M.

    Returns:
        int64 [Q], from 1, on the device of the queries. Syncs with the device once for each tile.

    Raises:
        HimoError: shapes, dtypes or indices that do not fit, a query without a positive, or a row
            that is not finite, which is named.
    """
    return ranks_and_ties(
        queries, candidates, positive_query, positive_candidate, tile_bytes=tile_bytes
    )[0]


def ranks_and_ties(
    queries: Tensor,  # [Q, D]
    candidates: Tensor,  # [M, D]
    positive_query: Tensor,  # [P]
    positive_candidate: Tensor,  # [P]
    *,
    tile_bytes: int = _TILE_BYTES,
) -> tuple[Tensor, Tensor]:
    """`retrieval_ranks`, and for each query whether a wrong candidate scores as its best positive.

    Returns:
        int64 [Q] and bool [Q].
    """
    _check_features(queries, candidates)
    count, total = queries.shape[0], candidates.shape[0]
    order = _check_pairs(positive_query, positive_candidate, count, total)
    positive_query, positive_candidate = positive_query[order], positive_candidate[order]
    bounds = torch.searchsorted(
        positive_query, torch.arange(count + 1, device=positive_query.device)
    ).tolist()
    distinct, copies = _distinct_rows(candidates)

    ranks = torch.empty(count, dtype=torch.int64, device=queries.device)
    tied = torch.empty(count, dtype=torch.bool, device=queries.device)
    rows = max(1, tile_bytes // (4 * max(1, total)))
    with full_float32(queries.device.type), torch.no_grad():
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            scores = queries[start:stop] @ distinct.t()  # [rows, M], one product for all of a row
            if copies is not None:
                scores = scores[:, copies]
            pairs = slice(bounds[start], bounds[stop])
            row = positive_query[pairs] - start
            positive = scores[row, positive_candidate[pairs]]
            best = scores.new_full((stop - start,), -torch.inf)
            best.scatter_reduce_(0, row, positive, "amax")
            # Positives equal to the best one are counted below, other positives are not.
            equal = torch.zeros_like(best).index_add_(0, row, (positive == best[row]).float())
            tied[start:stop] = (scores == best[:, None]).sum(1) > equal
            above = scores.ge_(best[:, None]).sum(1)  # overwrites; exact up to _MAX_CANDIDATES
            ranks[start:stop] = (above - equal + 1).long()
            del scores  # before the next ones are made
    return ranks, tied


def recall(ranks: Tensor, k: int) -> float:
    """R@k: the percentage of ranks [Q] that are at most k."""
    return 100 * int((ranks <= k).sum()) / len(ranks)


def caption_segments(text: str) -> list[str]:
    """The sentences of a text; of more than MAX_SEGMENTS, as many segments of whole sentences."""
    sentences = split_sentences(text)
    if len(sentences) <= MAX_SEGMENTS:
        return sentences
    ends = segment_boundaries(len(sentences), MAX_SEGMENTS)
    return [" ".join(sentences[start:end]) for start, end in pairwise([0, *ends])]


def segment_boundaries(count: int, segments: int) -> list[int]:
    """Where each segment ends: floor(count * k / segments) for k = 1..segments.

    5 sentences in 3 segments give [1, 3, 5], that is 1, 2 and 2 sentences, as in the paper.

    Raises:
        HimoError: fewer sentences than segments, or no segment.
    """
    if not 1 <= segments <= count:
        raise HimoError(
            f"segment_boundaries: expected 1 to {count} segments of {count} sentences, "
            f"got {segments}"
        )
    return [count * k // segments for k in range(1, segments + 1)]


def sentence_prefixes(sentences: Sequence[str]) -> list[str]:
    """The texts of the first 1, 2, ... sentences, joined by spaces."""
    return [" ".join(sentences[:end]) for end in range(1, len(sentences) + 1)]


def monotone_accuracy(scores: Tensor) -> float:
    """HiMo@2 and HiMo@3: the percentage of rows with s_1 < s_2 < ... < s_K, HiMo-CLIP eq. (6).

    Args:
        scores: [N, K], N >= 1.
    """
    _check_series(scores)
    return 100 * int(rises(scores).sum()) / len(scores)


def rises(scores: Tensor) -> Tensor:
    """Whether s_1 < s_2 < ... < s_K in each row of [N, K], bool [N]."""
    return (scores.diff(dim=1) > 0).all(dim=1)


def growth_correlation(scores: Tensor) -> Tensor:
    """HiMo@K of each row: the Pearson correlation of k = 1..K and s_k, HiMo-CLIP eq. (5).

    Args:
        scores: [N, K], N >= 1, K >= 2.

    Returns:
        float64 [N], from -1 to 1; 0 for a row of K equal scores, whose correlation is undefined.
    """
    _check_series(scores)
    series = scores.double()
    step = torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device)
    step -= step.mean()
    # Scaling first keeps the squares of the smallest and the largest floats in range.
    series = series - series.mean(dim=1, keepdim=True)
    series = series / series.abs().amax(dim=1, keepdim=True)
    correlation = (series @ step) / (series.norm(dim=1) * step.norm())
    # The scores themselves: the mean of equal numbers may differ from them in the last bit.
    constant = (scores == scores[:, :1]).all(dim=1)
    return correlation.masked_fill(constant, 0.0).clamp_(-1, 1)


def nonfinite_rows(features: Tensor) -> list[int]:
    """The rows of [N, D] that hold a NaN or an infinity."""
    # The largest magnitude of a row is NaN or infinite where an element is: no mask of [N, D].
    finite = torch.linalg.vector_norm(features, torch.inf, dim=1).isfinite()
    return [] if bool(finite.all()) else (~finite).nonzero()[:, 0].tolist()


def _check_features(queries: Tensor, candidates: Tensor) -> None:
    if candidates.dim() and candidates.shape[0] > _MAX_CANDIDATES:
        raise HimoError(
            f"retrieval_ranks: expected at most {_MAX_CANDIDATES:,} candidates, got "
            f"{candidates.shape[0]:,}"
        )
    for name, features in (("queries", queries), ("candidates", candidates)):
        if features.dim() != 2 or features.shape[0] == 0 or features.shape[1] != queries.shape[-1]:
            raise HimoError(
                f"retrieval_ranks: expected {name} of shape [rows, {queries.shape[-1]}], at least "
                f"one row, got {list(features.shape)}"
            )
        if features.dtype != torch.float32 or features.device != queries.device:
            raise HimoError(
                f"retrieval_ranks: expected {name} in float32 on {queries.device}, got "
                f"{features.dtype} on {features.device}"
            )
        if wrong := nonfinite_rows(features):
            raise HimoError(
                f"retrieval_ranks: expected finite features, but {len(wrong)} of "
                f"{features.shape[0]} rows of {name} are not, the first is row {wrong[0]}"
            )


def _check_pairs(query: Tensor, candidate: Tensor, count: int, total: int) -> Tensor:
    """The order that sorts the pairs by query."""
    if query.shape != candidate.shape or query.dim() != 1:
        raise HimoError(
            "retrieval_ranks: expected as many positive_query as positive_candidate, got shapes "
            f"{list(query.shape)} and {list(candidate.shape)}"
        )
    limits = (("positive_query", query, count), ("positive_candidate", candidate, total))
    for name, index, size in limits:
        if index.dtype != torch.int64:
            raise HimoError(f"retrieval_ranks: expected {name} of dtype int64, got {index.dtype}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise HimoError(
                f"retrieval_ranks: expected {name} from 0 to {size - 1}, got {int(index.min())} "
                f"to {int(index.max())}"
            )
    without = (torch.bincount(query, minlength=count) == 0).nonzero()
    if without.numel():
        raise HimoError(
            f"retrieval_ranks: {without.shape[0]} of {count} queries have no positive, the first "
            f"is query {int(without[0])}"
        )
    order = (query * total + candidate).argsort()
    pair = (query * total + candidate)[order]
    twice = (pair[1:] == pair[:-1]).nonzero()
    if twice.numel():
        first = int(pair[int(twice[0])])
        raise HimoError(
            f"retrieval_ranks: query {first // total} and candidate {first % total} are paired "
            "twice"
        )
    return order


def _distinct_rows(candidates: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows, and for each candidate its row among them; None if no row repeats.

    A matrix product may round equal columns differently, depending on their place in its blocks.
    """
    first: dict[bytes, int] = {}  # by digest: a row may take 4 kB
    which = [
        first.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), index)
        for index, row in enumerate(candidates.detach().cpu().numpy())
    ]
    if len(first) == len(which):
        return candidates, None
    number = {index: position for position, index in enumerate(first.values())}
    copies = torch.tensor([number[index] for index in which], device=candidates.device)
    return candidates[list(number)], copies


def _check_series(scores: Tensor) -> None:
    if scores.dim() != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
        raise HimoError(
            f"HiMo@K: expected scores of shape [N, K], N >= 1 and K >= 2, got {list(scores.shape)}"
        )
    if wrong := nonfinite_rows(scores):
        raise HimoError(f"HiMo@K: expected finite scores, but row {wrong[0]} is not")
