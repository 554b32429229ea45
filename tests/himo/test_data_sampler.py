"""The order of an epoch, for uneven data, several ranks and a resume within it (promise G23)."""

from collections.abc import Iterator
from itertools import chain

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himo.data import EpochSampler
from himo.errors import HimoError

BATCH = 4


def _ranks(length: int, world: int, **options: object) -> list[EpochSampler]:
    return [
        EpochSampler(length, BATCH, rank=rank, world_size=world, **options)  # type: ignore[arg-type]
        for rank in range(world)
    ]


def _uneven() -> Iterator[tuple[int, int]]:
    for world in (1, 2, 3):
        step = BATCH * world
        for rest in sorted({0, 1, BATCH - 1, BATCH, BATCH + 1, step - 1} & set(range(step))):
            for full in (1, 3):
                yield full * step + rest, world


@pytest.mark.parametrize(("length", "world"), list(_uneven()))
def test_training_batches_are_full_and_no_sample_comes_twice(length: int, world: int) -> None:
    samplers = _ranks(length, world)
    batches = [list(sampler) for sampler in samplers]

    steps = length // (BATCH * world)
    assert [len(b) for b in batches] == [len(s) for s in samplers] == [steps] * world
    assert all(len(batch) == BATCH for batch in chain(*batches))
    seen = list(chain(*chain(*batches)))
    assert len(set(seen)) == len(seen) == steps * BATCH * world
    assert set(seen) <= set(range(length))


@pytest.mark.parametrize(("length", "world"), [*_uneven(), (1, 3), (5, 3), (0, 2)])
def test_evaluation_takes_every_sample_once(length: int, world: int) -> None:
    samplers = _ranks(length, world, drop_last=False, shuffle=False)
    batches = [list(sampler) for sampler in samplers]

    assert sorted(chain(*chain(*batches))) == list(range(length))
    assert [len(b) for b in batches] == [len(sampler) for sampler in samplers]
    assert all(len(batch) == BATCH for rank in batches for batch in rank[:-1])
    assert all(len(batch) > 0 for batch in chain(*batches))


def test_an_epoch_is_a_function_of_seed_and_number() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(100, BATCH, seed)
        sampler.set_epoch(epoch)
        numpy.random.seed(epoch)  # the global state must not matter
        return list(chain(*sampler))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert orders == {key: order(*key) for key in orders}
    assert len(set(map(tuple, orders.values()))) == 9


def test_the_order_does_not_change_between_versions() -> None:
    # A run that is resumed with another version of numpy goes on in the same order.
    sampler = EpochSampler(10, 5, seed=3)
    sampler.set_epoch(2)
    assert list(sampler) == [[8, 1, 7, 2, 0], [3, 4, 9, 5, 6]]


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(1, 120),
    batch=st.integers(1, 9),
    world=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
    drop_last=st.booleans(),
    data=st.data(),
)
def test_a_resumed_epoch_goes_on_as_if_never_stopped(
    length: int,
    batch: int,
    world: int,
    seed: int,
    epoch: int,
    drop_last: bool,
    data: st.DataObject,
) -> None:
    if drop_last and length < batch * world:
        return
    rank = data.draw(st.integers(0, world - 1))
    whole = EpochSampler(length, batch, seed, rank, world, drop_last)
    whole.set_epoch(epoch)
    expected = list(whole)
    stop = data.draw(st.integers(0, len(expected)))
    for _ in range(stop):
        whole.advance()

    resumed = EpochSampler(length, batch, seed, rank, world, drop_last)
    resumed.load_state_dict(whole.state_dict())

    assert list(resumed) == expected[stop:]
    if rank == 0:  # which has a batch wherever any rank has one
        assert resumed.global_batches() == len(expected) - stop
    assert list(whole) == expected[stop:]  # the same object goes on too
    resumed.set_epoch(epoch)
    assert list(resumed) == expected


@given(
    length=st.integers(40, 120),
    stop=st.integers(0, 4),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
@settings(max_examples=50, deadline=None)
def test_a_run_goes_on_with_another_number_of_ranks(
    length: int, stop: int, worlds: tuple[int, int]
) -> None:
    before, after = (
        [EpochSampler(length, 2, 7, rank, world, drop_last=False) for rank in range(world)]
        for world in worlds
    )
    seen = [batch for sampler in before for batch in list(sampler)[:stop]]
    for _ in range(stop):
        before[0].advance()
    for sampler in after:
        sampler.load_state_dict(before[0].state_dict())
        seen += list(sampler)
    assert sorted(chain(*seen)) == list(range(length))


def test_without_a_new_shuffle_every_epoch_has_the_order_of_the_first() -> None:
    once, anew = (EpochSampler(20, 4, seed=3, reshuffle=reshuffle) for reshuffle in (False, True))
    first = list(anew)
    for epoch in range(3):
        once.set_epoch(epoch)
        assert list(once) == first
    anew.set_epoch(1)
    assert list(anew) != first and sorted(chain(*anew)) == sorted(chain(*first))


BAD = {
    "batch": ((10, 0), "batch_size: expected at least 1, got 0"),
    "rank": ((10, 1, 0, 2, 2), "rank: expected 0 to 1, got 2"),
    "seed": ((10, 1, -1), "seed: expected at least 0, got -1"),
    "too few": ((7, 4, 0, 0, 2), "7 samples do not fill one batch of 4 on each of 2 processes"),
    "none": ((0, 1), "0 samples do not fill one batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(HimoError, match=message):
        EpochSampler(*arguments)


@pytest.mark.parametrize(("length", "seed", "name"), [(9, 0, "length 10"), (10, 1, "seed 0")])
def test_a_state_of_another_order_is_refused(length: int, seed: int, name: str) -> None:
    state = EpochSampler(10, 2).state_dict()
    with pytest.raises(HimoError, match=f"resume: the order was made with {name}"):
        EpochSampler(length, 2, seed).load_state_dict(state)
