"""Accelerated losses over ranks keep their values and, after DDP's mean, their gradients."""

import pytest
from launch import found
from upstream import open_clip_loss

pytestmark = pytest.mark.slow  # test_exact.py has the quick launch of two ranks
WORLDS = [pytest.param(world, id=f"W={world}") for world in (2, 3)]


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accelerated")
    return found("accelerate_worker.py", request.param, folder, str(seed))


def assert_below(limit: float, ranks: list[dict], word: str, what: str) -> None:
    for rank, checks in enumerate(ranks):
        errors = {n: e for n, e in checks.items() if n.startswith(word) and n.endswith(what)}
        assert errors, (word, what)
        for name, error in errors.items():
            assert error <= limit, f"rank {rank}: {name}: {error:.3e}"


@pytest.mark.skipif(open_clip_loss() is None, reason="open_clip_torch is not installed")
def test_clip_loss_with_each_pair_of_its_flags(ranks):
    assert all(sum(name.startswith("open_clip") for name in checks) == 24 for checks in ranks)
    assert_below(1e-12, ranks, "open_clip", "values")
    assert_below(1e-10, ranks, "open_clip", "gradients")


@pytest.mark.skipif(open_clip_loss() is None, reason="open_clip_torch is not installed")
def test_the_mean_over_ranks_is_counted_where_a_value_needs_it(ranks):
    for local_loss, number in ((True, 0), (False, 1)):
        word = f"open_clip, local_loss={local_loss}"
        calls = {
            checks[n]
            for checks in ranks
            for n in checks
            if n.startswith(word) and n.endswith("all_reduces")
        }
        assert calls == {number}


@pytest.mark.parametrize(
    "word, number",
    [
        ("siglip", 4),
        ("coca", 1),
        ("MultipleNegativesRankingLoss", 3),
        ("CachedMultipleNegativesRankingLoss", 3),
        ("lightly", 1),
        ("grad_cache", 1),
    ],
)
def test_other_libraries_losses(ranks, word, number):
    found = [sum(n.startswith(word) and n.endswith("values") for n in checks) for checks in ranks]
    if not any(found):
        pytest.skip("the package is not installed (make setup)")
    assert set(found) == {number}
    assert_below(1e-12, ranks, word, "values")
    assert_below(1e-10, ranks, word, "gradients")


def test_the_released_model(ranks):
    assert_below(1e-10, ranks, "released", "values")
    assert_below(1e-6, ranks, "released", "gradients")  # SVD there, gap_eps here
