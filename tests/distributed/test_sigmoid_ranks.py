"""W processes give the sigmoid loss and the gradients of one, and of open_clip's SigLipLoss."""

import pytest
import torch
from launch import found
from test_exact import assert_below
from upstream import open_clip_loss

from himo_kernels.sigmoid_loss.op import BLOCK

pytestmark = pytest.mark.slow  # test_exact.py has the quick launch of two ranks
WORLDS = [pytest.param(world, id=f"W={world}") for world in (1, 2, 3)]
_started: dict[int, list[dict]] = {}  # results by world size: one launch serves every test
STRATEGIES = pytest.mark.parametrize("strategy", ["gather", "ring"])
PARTS = ("share", "images", "texts", "scale", "bias")


@pytest.fixture(params=WORLDS)
def ranks(request, seed, tmp_path_factory):
    world = request.param
    if world not in _started:
        folder = tmp_path_factory.mktemp("sigmoid")
        _started[world] = found("sigmoid_worker.py", world, folder, str(seed))
    return _started[world]


@STRATEGIES
@pytest.mark.parametrize("dtype, limit", [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("shape", ["equal", "uneven", "an empty rank", "one row each"])
def test_shares_and_gradients(ranks, shape, dtype, limit, strategy):
    for part in PARTS:
        assert_below(limit, ranks, part, shape, dtype, strategy)


def test_every_backend_of_the_blocks_is_run(ranks):
    names = {
        name.rsplit(", ")[-1] for name in ranks[0] if name.startswith("share, uneven, float32")
    }
    expected = {name for name in BLOCK.backends if BLOCK.why_not(name, torch.eye(2)) is None}
    if len(ranks) != 2:  # the interpreter takes seconds per rank
        expected -= {"triton"}
    assert names == {"auto", *expected}


@STRATEGIES
def test_after_the_mean_of_ddp_every_parameter_has_the_gradient_of_one_process(ranks, strategy):
    assert_below(1e-12, ranks, "after DDP's mean", strategy)


@STRATEGIES
@pytest.mark.skipif(open_clip_loss() is None, reason="open_clip is not installed")
@pytest.mark.parametrize("exchange", ["bidir", "shift", "reduce", "gather"])
def test_open_clip_over_the_same_ranks(ranks, exchange, strategy):
    for part in PARTS:
        assert_below(1e-12, ranks, "open_clip", part, exchange, strategy)


def test_an_error_on_one_rank_is_raised_on_all(ranks):
    assert_below(0.0, ranks, "refusal")
    assert_below(1e-12, ranks, "one process")
