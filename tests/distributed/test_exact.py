"""W processes give the values and gradients of one: 1e-6 in float32, 1e-12 in float64 (G7, G23)."""

from collections import Counter

import pytest
import torch
from launch import found

from himo_kernels.distributed.cost import step_traffic
from himo_kernels.info_nce.block import BLOCK

LIMITS = pytest.mark.parametrize("dtype, limit", [("float32", 1e-6), ("float64", 1e-12)])
STRATEGIES = pytest.mark.parametrize("strategy", ["gather", "ring"])


WORLDS = [
    pytest.param(world, id=f"W={world}", marks=[] if world == 2 else pytest.mark.slow)
    for world in (1, 2, 3, 4)
]
several_ranks = pytest.mark.parametrize("ranks", WORLDS[1:], indirect=True)
_started: dict[int, list[dict]] = {}  # results by world size: one launch serves every test


@pytest.fixture(params=WORLDS)
def ranks(request, seed, tmp_path_factory):
    world = request.param
    if world not in _started:
        folder = tmp_path_factory.mktemp("exact")
        _started[world] = found("exact_worker.py", world, folder, str(seed))
    return _started[world]


def assert_below(limit: float, ranks: list[dict], *words: str) -> None:
    """Every check on each rank whose name begins with the first word and contains the others."""
    errors = [
        (error, f"rank {rank}: {name}")
        for rank, checks in enumerate(ranks)
        for name, error in checks.items()
        if name.startswith(words[0]) and all(f", {word}" in name for word in words[1:])
    ]
    assert errors, words
    worst, name = max(errors)
    assert worst <= limit, f"{name}: {worst:.3e} above {limit:g}"


@LIMITS
@STRATEGIES
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_loss_and_gradients(ranks, preset, scope, strategy, dtype, limit):
    assert_below(limit, ranks, f"loss {preset} {scope}", dtype, strategy)
    assert_below(limit, ranks, f"scale {preset} {scope}", dtype, strategy)


@LIMITS
@STRATEGIES
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_loss_and_gradients_with_decomposed_images(ranks, preset, scope, strategy, dtype, limit):
    assert_below(limit, ranks, f"loss both {preset} {scope}", dtype, strategy)
    assert_below(limit, ranks, f"scale both {preset} {scope}", dtype, strategy)


@LIMITS
@STRATEGIES
def test_after_the_mean_of_ddp_every_parameter_has_the_gradient_of_one_process(
    ranks, strategy, dtype, limit
):
    assert_below(limit, ranks, "after DDP's mean", dtype, strategy)


@LIMITS
def test_accumulation_over_ranks_gives_the_gradient_of_the_whole_batch(ranks, dtype, limit):
    assert_below(limit, ranks, "accumulation", dtype)


@LIMITS
@STRATEGIES
def test_info_nce_alone_on_every_backend(ranks, strategy, dtype, limit):
    assert_below(limit, ranks, "info_nce", dtype, strategy)


def test_the_backends_of_the_blocks_are_run(ranks):
    runs = [name for name in ranks[0] if name.startswith("info_nce, ") and ", float32" in name]
    names = {name.rsplit(", ")[-1] for name in runs}
    expected = {name for name in BLOCK.backends if BLOCK.why_not(name, torch.eye(2)) is None}
    if len(ranks) != 2:  # the interpreter takes seconds per rank
        expected -= {"triton"}
    assert names == {"auto", *expected}


@several_ranks
def test_the_backend_of_the_module_is_that_of_its_loss(ranks):
    assert_below(0.0, ranks, "the module's backend")


@STRATEGIES
def test_the_official_preset_is_the_released_code_on_each_rank(ranks, strategy):
    assert_below(1e-12, ranks, "released code, values", strategy)
    assert_below(1e-9, ranks, "released code, gradients", strategy)  # SVD in the released code


def test_all_gather_is_exact_and_so_is_its_gradient(ranks):
    assert_below(0.0, ranks, "all_gather")


def test_moments_over_ranks_are_those_of_the_joined_batch(ranks):
    assert_below(1e-12, ranks, "moments, [")


def test_moments_far_from_the_origin(ranks):
    # A mean 5e6 times the spread leaves 9 digits in the input; E[xx] - E[x]E[x] would leave 3.
    assert_below(1e-7, ranks, "moments, far mean")


@pytest.mark.parametrize("words", ["rank of tiny rows", "rank of same rows", "no variance"])
def test_the_floor_of_the_variance_is_that_of_one_process(ranks, words):
    assert_below(0.0, ranks, words)


def test_degenerate_captions_are_finite(ranks):
    assert_below(0.0, ranks, "degenerate")


@several_ranks
@STRATEGIES
def test_a_sub_group(ranks, strategy):
    assert_below(1e-12, ranks, "sub-group", strategy)
    assert ranks[1][f"not a member, {strategy}"] == 0


@several_ranks
def test_the_next_block_is_on_its_way_while_a_product_is_computed(ranks):
    later = len(ranks) - 1
    forward = ["send keys", "product", "wait"] * later + ["product"]
    # Gradients travel with the keys of the next step; only the last two go alone.
    backward = ["send keys", "product", "wait"]
    backward += ["send keys gradients", "product", "wait"] * (later - 1)
    backward += ["send gradients", "product", "wait"] + ["send gradients", "wait"]
    for checks in ranks:
        assert checks["events of the forward"] == forward
        assert checks["events of the backward"] == backward
        assert checks["host reads of the ring"] == 0


@several_ranks
def test_collectives_are_not_captured(ranks):
    assert_below(0.0, ranks, "make_graphed is refused")


@several_ranks
def test_without_the_agreement_the_bits_are_the_same(ranks):
    assert_below(0.0, ranks, "check_ranks changes no bit")
    for checks in ranks:
        assert checks["gathers, check_ranks=True"] == checks["gathers, check_ranks=False"] + 2


@several_ranks
@STRATEGIES
@pytest.mark.parametrize("shape", ["N > D", "N < D", "one row each"])
def test_the_cost_model_counts_what_is_sent(ranks, shape, strategy):
    counted = [checks[f"traffic, {shape}, {strategy}"] for checks in ranks]
    rows, features = counted[0]["rows"], counted[0]["features"]
    expected = step_traffic(len(ranks), rows, features, strategy=strategy)
    for rank, traffic in enumerate(counted):
        sent = {kind: number for kind, number in traffic["bytes"].items() if number}
        if rank + 1 == len(ranks):
            sent["broadcast"] = expected["broadcast"]  # the last rank sends nothing
        assert +Counter(sent) == +expected
