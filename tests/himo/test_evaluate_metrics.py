"""Ranks against sorting, and the measures of growth against numpy and hand-worked cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from himo.errors import HimoError
from himo.evaluate.metrics import (
    growth_correlation,
    monotone_accuracy,
    nonfinite_rows,
    recall,
    retrieval_ranks,
    segment_boundaries,
    sentence_prefixes,
)
from himo.evaluate.retrieval import retrieval


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[set[int]]]:
    """Queries, candidates and the positives of each query.

    The features are small integers, so that every score is exact and ties are frequent.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    count, total = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    width = draw(st.integers(1, 5))
    queries, candidates = (
        torch.from_numpy(generator.integers(-3, 4, (rows, width)).astype(np.float32))
        for rows in (count, total)
    )
    positives = []
    for _ in range(count):
        size = generator.integers(1, min(total, 4) + 1)
        positives.append(set(generator.choice(total, size, replace=False).tolist()))
    return queries, candidates, positives


def ranks_of(
    queries: Tensor, candidates: Tensor, positives: list[set[int]], tile_bytes: int = 1 << 26
) -> list[int]:
    pairs = [(query, candidate) for query, own in enumerate(positives) for candidate in own]
    order = torch.randperm(len(pairs)).tolist()  # the order of the pairs means nothing
    query, candidate = torch.tensor([pairs[at] for at in order]).t()
    ranks = retrieval_ranks(queries, candidates, query, candidate, tile_bytes=tile_bytes)
    return ranks.tolist()


def ranks_by_sorting(queries: Tensor, candidates: Tensor, positives: list[set[int]]) -> list[int]:
    """The place of the first positive among the sorted candidates, competitors before equals."""
    ranks = []
    for scores, own in zip((queries @ candidates.t()).tolist(), positives, strict=True):
        best = max(own, key=lambda candidate: scores[candidate])
        others = own - {best}
        listed = [candidate for candidate in range(len(scores)) if candidate not in others]
        listed.sort(key=lambda candidate: (-scores[candidate], candidate == best))
        ranks.append(listed.index(best) + 1)
    return ranks


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 400))
def test_ranks_are_those_of_sorting_for_every_tile_size(problem, tile_bytes):
    assert ranks_of(*problem, tile_bytes) == ranks_by_sorting(*problem)


@settings(max_examples=100, deadline=None)
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_candidates_leaves_the_ranks(problem, random):
    queries, candidates, positives = problem
    order = list(range(len(candidates)))
    random.shuffle(order)
    moved = [{order.index(candidate) for candidate in own} for own in positives]
    assert ranks_of(queries, candidates[order], moved) == ranks_of(*problem)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_a_copy_of_the_best_positive_as_a_competitor_costs_one_rank(problem, data):
    queries, candidates, positives = problem
    query = data.draw(st.integers(0, len(queries) - 1))
    scores = queries[query] @ candidates.t()
    best = max(positives[query], key=lambda candidate: scores[candidate].item())
    more = torch.cat([candidates, candidates[best : best + 1]])
    assert ranks_of(queries, more, positives)[query] == ranks_of(*problem)[query] + 1


@pytest.mark.parametrize("total", [1, 7, 33, 130])
def test_copies_tie_exactly_whatever_the_rounding_of_the_product(total, generator):
    queries = F.normalize(torch.randn(total, 768, generator=generator), dim=1)
    order = torch.randperm(2 * total, generator=generator)
    twice = torch.cat([queries, queries])[order]
    first = order.argsort()[:total]  # where the first copy of each query went
    ranks = retrieval_ranks(queries, twice, torch.arange(total), first, tile_bytes=5000)
    assert ranks.tolist() == [2] * total


@pytest.mark.parametrize("tile_bytes", [1, 4 * 509 * 100, 1 << 26])
def test_a_positive_never_loses_to_itself(tile_bytes, generator):
    # With the score of the positive computed apart, rounding costs about a third of these.
    features = F.normalize(torch.randn(509, 768, generator=generator), dim=1)
    same = torch.arange(509)
    ranks = retrieval_ranks(features, features, same, same, tile_bytes=tile_bytes)
    assert ranks.tolist() == [1] * 509


def test_no_matrix_of_all_scores_exists(generator):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    queries, candidates = (torch.randn(n, 4, generator=generator) for n in (500, 3000))
    with Watch():
        ranks = retrieval_ranks(
            queries, candidates, torch.arange(500), torch.arange(500), tile_bytes=4 * 3000 * 7
        )
    assert largest == 3000 * 7
    expected = ranks_by_sorting(queries.double(), candidates.double(), [{i} for i in range(500)])
    assert (ranks - torch.tensor(expected)).abs().max() <= 1  # two scores may round to one


def test_scores_stay_in_float32_under_autocast_and_fast_matrix_products(generator):
    queries, candidates = (
        F.normalize(torch.randn(200, 64, generator=generator), dim=1) for _ in range(2)
    )
    same = torch.arange(200)
    expected = retrieval_ranks(queries, candidates, same, same)
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                precisions = [backend.fp32_precision for backend in backends]
                products.append((args[0].dtype, *precisions))
            return func(*args, **(kwargs or {}))

    before = [backend.fp32_precision for backend in backends]
    try:
        backends[0].fp32_precision, backends[1].fp32_precision = "bf16", "tf32"
        with torch.autocast("cpu", torch.bfloat16), Watch():
            ranks = retrieval_ranks(queries, candidates, same, same)
        assert [backend.fp32_precision for backend in backends] == ["bf16", "tf32"]  # as found
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
    assert products == [(torch.float32, "ieee", "tf32")]  # the setting of another device stays
    assert torch.equal(ranks, expected)


def test_retrieval_of_shared_texts_by_hand():
    # Images 0 and 1 show text 0, image 2 shows texts 1 and 2; captions 0 and 1 are one text.
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    result = retrieval(images, texts, [0, 1, 2, 2], [0, 0, 1, 2])
    # Scores of the texts 0, 1, 2:  image 0: 1, 0, .8   image 1: 0, 1, .6   image 2: .6, .8, .96
    assert result["ranks"] == {"image_to_text": [1, 3, 1], "text_to_image": [1, 2, 1]}
    assert result["image_to_text"] == {"R@1": 100 * 2 / 3, "R@5": 100, "R@10": 100}
    assert result["text_to_image"] == result["image_to_text"]
    assert (result["texts"], result["pairs"]) == (3, 4)
    assert result["chance_R@1"] == pytest.approx(100 * (1 + 1 + 2) / (3 * 3))
    assert result["ties"] == {"image_to_text": 0, "text_to_image": 0}


def test_a_perfect_model_of_labels_scores_100_and_as_captions_of_their_own_it_ties():
    images = torch.eye(4)[torch.arange(24) % 4]
    labels, own = [number % 4 for number in range(24)], list(range(24))
    result = retrieval(images, images, own, labels)
    assert result["image_to_text"]["R@1"] == result["text_to_image"]["R@1"] == 100
    assert (result["texts"], result["pairs"], result["chance_R@1"]) == (4, 24, 25)
    assert len(result["ranks"]["text_to_image"]) == 4
    apart = retrieval(images, images, own)
    assert apart["image_to_text"] == {"R@1": 0, "R@5": 0, "R@10": 100}  # each ranks sixth
    assert apart["ties"] == {"image_to_text": 24, "text_to_image": 24}


def test_a_model_that_tells_nothing_apart_finds_nothing():
    same = torch.ones(6, 4) / 2
    result = retrieval(same, same, list(range(6)), [0, 0, 0, 1, 2, 3])
    # Of 6 images 3 are wrong for text 0, 5 for the others; of 4 texts 3 are wrong for each image.
    assert result["ranks"] == {"image_to_text": [4] * 6, "text_to_image": [4, 6, 6, 6]}
    assert result["ties"] == {"image_to_text": 6, "text_to_image": 4}


def test_texts_that_all_differ_are_retrieved_as_in_the_literature(generator):
    images, texts = (torch.randn(n, 8, generator=generator) for n in (12, 60))
    owners = [number // 5 for number in range(60)]  # 5 captions of each, as COCO has
    result = retrieval(images, texts, owners)
    assert result == retrieval(images, texts, owners, list(range(60)))
    # As CLIP_benchmark counts: among the k nearest of each query is one of its own.
    scores, positive = images @ texts.t(), torch.tensor(owners) == torch.arange(12)[:, None]
    for way, score, right in (
        ("image_to_text", scores, positive),
        ("text_to_image", scores.t(), positive.t()),
    ):
        for k in (1, 5, 10):
            hits = right.gather(1, score.topk(k).indices).any(1)
            assert result[way][f"R@{k}"] == pytest.approx(100 * hits.double().mean().item())
    assert result["chance_R@1"] == pytest.approx(100 / 12)


def test_one_text_of_many_images_takes_memory_of_the_pairs_alone():
    count = 20_000  # 400 million pairs of an image and a caption, 20,000 of an image and a text
    features = torch.eye(2)[torch.zeros(count, dtype=torch.int64)]
    result = retrieval(features, features, list(range(count)), [0] * count)
    assert (result["texts"], result["pairs"], result["chance_R@1"]) == (1, count, 100)
    assert result["image_to_text"]["R@1"] == result["text_to_image"]["R@1"] == 100


def test_recall_is_the_percentage_of_hits():
    ranks = torch.tensor([1, 2, 5, 6, 11])
    assert [recall(ranks, k) for k in (1, 5, 10)] == [20, 60, 80]


ROWS = torch.ones(3, 4)
INDEX = torch.arange(3)


@pytest.mark.parametrize(
    ("queries", "candidates", "query", "candidate", "message"),
    [
        (ROWS.double(), ROWS, INDEX, INDEX, "queries in float32"),
        (ROWS, ROWS.half(), INDEX, INDEX, "candidates in float32 on cpu, got torch.float16"),
        (ROWS, ROWS[:, :2], INDEX, INDEX, r"candidates of shape \[rows, 4\].*got \[3, 2\]"),
        (ROWS, ROWS[:1].expand(2**24 + 1, 4), INDEX, INDEX, "at most 16,777,216 candidates"),
        (ROWS[:0], ROWS, INDEX[:0], INDEX[:0], "at least one row"),
        (ROWS, ROWS, INDEX, INDEX[:2], "as many positive_query as positive_candidate"),
        (ROWS, ROWS, INDEX, INDEX + 1, "positive_candidate from 0 to 2, got 1 to 3"),
        (ROWS, ROWS, INDEX - 1, INDEX, "positive_query from 0 to 2, got -1 to 1"),
        (ROWS, ROWS, INDEX.int(), INDEX, "dtype int64, got torch.int32"),
        (ROWS, ROWS, INDEX[:2], INDEX[:2], "1 of 3 queries have no positive.*query 2"),
        (ROWS, ROWS, INDEX[[0, 1, 2, 1]], INDEX[[0, 1, 2, 1]], "query 1 and candidate 1.*twice"),
    ],
)
def test_bad_arguments_are_named(queries, candidates, query, candidate, message):
    with pytest.raises(HimoError, match=message):
        retrieval_ranks(queries, candidates, query, candidate)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["queries", "candidates"])
def test_a_row_that_is_not_finite_is_named(value, name):
    features = {"queries": ROWS.clone(), "candidates": ROWS.clone()}
    features[name][1, 2] = value
    with pytest.raises(HimoError, match=f"1 of 3 rows of {name}.*first is row 1"):
        retrieval_ranks(features["queries"], features["candidates"], INDEX, INDEX)


def test_nonfinite_rows_are_found_and_the_largest_floats_are_not_among_them():
    largest = torch.finfo(torch.float32).max
    features = torch.full((4, 8), largest)
    features[1, 3], features[3, 0], features[3, 1] = torch.nan, torch.inf, -torch.inf
    assert nonfinite_rows(features) == [1, 3]


def test_prefixes_grow_by_a_sentence():
    assert sentence_prefixes(["A.", "B.", "C."]) == ["A.", "A. B.", "A. B. C."]


@pytest.mark.parametrize(
    ("count", "segments", "sizes"),
    [(5, 3, [1, 2, 2]), (6, 2, [3, 3]), (7, 3, [2, 2, 3]), (4, 4, [1, 1, 1, 1]), (3, 2, [1, 2])],
)
def test_segments_of_the_paper(count, segments, sizes):
    ends = segment_boundaries(count, segments)
    assert np.diff([0, *ends]).tolist() == sizes


@given(st.integers(1, 60), st.integers(1, 60))
def test_segments_cover_all_sentences_evenly(count, segments):
    if segments > count:
        with pytest.raises(HimoError, match=f"1 to {count} segments of {count} sentences"):
            segment_boundaries(count, segments)
        return
    sizes = np.diff([0, *segment_boundaries(count, segments)])
    assert sizes.sum() == count
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


def test_monotone_accuracy_counts_ties_as_failures():
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.2], [0.3, 0.2, 0.4], [-1.0, 0.0, 1e-9]])
    assert monotone_accuracy(scores) == 50
    assert monotone_accuracy(scores[:, :2]) == 75


@st.composite
def series(draw: st.DrawFn) -> Tensor:
    rows, length = draw(st.integers(1, 6)), draw(st.integers(2, 17))
    seed = draw(st.integers(0, 2**32 - 1))
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, length)))


@settings(max_examples=100, deadline=None)
@given(series())
def test_growth_correlation_is_pearsons(scores):
    steps = np.arange(1, scores.shape[1] + 1)
    expected = [np.corrcoef(steps, row)[0, 1] for row in scores.numpy()]
    np.testing.assert_allclose(growth_correlation(scores).numpy(), expected, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(series(), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_growth_correlation_is_invariant_to_scale_and_shift(scores, scale, shift):
    expected = growth_correlation(scores)
    assert torch.allclose(growth_correlation(scale * scores + shift), expected, atol=1e-8)
    assert torch.allclose(growth_correlation(-scale * scores), -expected, atol=1e-12)


def test_growth_correlation_of_constant_and_extreme_series():
    smallest = 2.0**-149  # of float32
    rows = [
        [0.1, 0.1, 0.1],  # the mean of three 0.1 is not 0.1
        [0.0, 0.0, 0.0],
        [0.0, smallest, 2 * smallest],
        [3e38, -3e38, 3e38],
        [1.0, 2.0, 3.0],
    ]
    expected = torch.tensor([0, 0, 1, 0, 1], dtype=torch.float64)
    assert torch.allclose(growth_correlation(torch.tensor(rows)), expected, atol=1e-9)


@pytest.mark.parametrize("measure", [monotone_accuracy, growth_correlation])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.ones(2, 1), r"K >= 2, got \[2, 1\]"),
        (torch.ones(0, 3), r"N >= 1 and K >= 2, got \[0, 3\]"),
        (torch.ones(3), r"got \[3\]"),
        (torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), "row 1 is not"),
    ],
)
def test_bad_series_are_named(measure, scores, message):
    with pytest.raises(HimoError, match=message):
        measure(scores)
