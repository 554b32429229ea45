"""W processes give info_nce of one direction, and of labels, with the gradients of one."""

from collections import Counter

import pytest
import torch
from launch import found
from test_exact import assert_below

from himo_kernels.distributed.cost import step_traffic
from himo_kernels.distributed.loss import block_for

pytestmark = pytest.mark.slow  # test_exact.py has the quick launch of two ranks
WORLDS = [pytest.param(world, id=f"W={world}") for world in (1, 2, 3)]
_started: dict[int, list[dict]] = {}  # results by world size: one launch serves every test
PARTS = ("share", "images", "texts", "scale")
DIRECTIONS = pytest.mark.parametrize("directions", ["both", "rows", "columns"])
PAIRS = pytest.mark.parametrize(
    "pairs", ["no labels, gather", "no labels, ring", "positive, gather", "exclude, gather"]
)


@pytest.fixture(params=WORLDS)
def ranks(request, seed, tmp_path_factory):
    world = request.param
    if world not in _started:
        folder = tmp_path_factory.mktemp("labels")
        _started[world] = found("labels_worker.py", world, folder, str(seed))
    return _started[world]


@PAIRS
@DIRECTIONS
@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("shape", ["equal", "uneven", "an empty rank", "one row each"])
def test_shares_and_gradients_are_those_of_the_dense_formula(
    ranks, shape, constants, directions, pairs
):
    for part in PARTS:
        words = (directions, pairs, f"constants={constants}")
        assert_below(1e-12, ranks, f"{part}, {shape}, float64", *words)
        if shape == "uneven":
            assert_below(1e-6, ranks, f"{part}, {shape}, float32", *words)


@PAIRS
@DIRECTIONS
def test_the_mean_of_the_shares_is_the_loss_of_one_process(ranks, directions, pairs):
    for part in PARTS:
        assert_below(1e-12, ranks, f"{part}, one process", directions, pairs)


@pytest.mark.parametrize("pairs", ["no labels", "positive"])
def test_every_backend_is_run(ranks, pairs):
    begins = f"share, uneven, float32, rows, {pairs}"
    names = {name.rsplit(", ")[-1] for name in ranks[0] if name.startswith(begins)}
    block = block_for(None if pairs == "no labels" else torch.eye(2))
    expected = {name for name in block.backends if block.why_not(name, torch.eye(2)) is None}
    if len(ranks) != 2:  # the interpreter takes seconds per rank
        expected -= {"triton"}
    assert names == {"auto", *expected}


@pytest.mark.parametrize("decompose_images", [False, True])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_the_head_with_labels_is_that_of_one_process(ranks, preset, decompose_images):
    words = (preset, f"decompose_images={decompose_images}")
    assert_below(1e-12, ranks, "head after DDP's mean", *words)
    assert_below(1e-12, ranks, "head, contrastive_loss", *words)
    assert_below(1e-12, ranks, "head, component_loss", *words)


def test_the_head_with_labels_is_the_formula(ranks):
    assert_below(1e-12, ranks, "head against the formula")


def test_a_side_without_a_gradient(ranks):
    assert_below(1e-12, ranks, "frozen images")
    assert_below(0.0, ranks, "no gradient")


def test_without_the_agreement_the_bits_are_the_same_and_strides_change_nothing(ranks):
    assert_below(0.0, ranks, "unchecked")
    assert_below(1e-12, ranks, "strided")


def test_features_of_16_bits(ranks):
    assert_below(1e-6, ranks, "half")
    assert_below(0.0, ranks, "dtypes")


@pytest.mark.parametrize("ranks", WORLDS[1:], indirect=True)
def test_the_cost_model_counts_what_is_sent(ranks):
    for rank, checks in enumerate(ranks):
        counted = checks["traffic"]
        expected = step_traffic(len(ranks), counted["rows"], counted["features"], labels=True)
        sent = {kind: number for kind, number in counted["bytes"].items() if number}
        if rank + 1 == len(ranks):
            sent["broadcast"] = expected["broadcast"]  # the last rank sends nothing
        assert +Counter(sent) == +expected
