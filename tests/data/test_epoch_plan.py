import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.data.epoch_plan import PAD, EpochPlan, local_streams
from cnsdiff_dist.errors import UserError

plans = st.builds(
    lambda rows, streams, width, block, seed: EpochPlan(
        rows, streams * width, streams, block, seed
    ),
    rows=st.integers(1, 150),
    streams=st.integers(1, 8),
    width=st.integers(1, 20),
    block=st.integers(1, 100),
    seed=st.integers(0, 3),
)


@given(plans, st.integers(0, 3))
def test_an_epoch_takes_every_row_exactly_once(plan: EpochPlan, epoch: int) -> None:
    orders = [plan.stream_order(epoch, stream) for stream in range(plan.streams)]
    assert {len(order) for order in orders} == {plan.stream_rows}
    rows = np.concatenate(orders)
    assert sorted(rows[rows != PAD]) == list(range(plan.rows))


@given(plans, st.integers(0, 3))
def test_steps_tile_a_stream_and_count_their_rows(plan: EpochPlan, epoch: int) -> None:
    for stream in range(plan.streams):
        steps = [plan.step_rows(epoch, step, stream) for step in range(plan.steps)]
        assert np.array_equal(np.concatenate(steps), plan.stream_order(epoch, stream))
    for step in range(plan.steps):
        taken = np.concatenate([plan.step_rows(epoch, step, s) for s in range(plan.streams)])
        assert plan.valid_rows(step) == (taken != PAD).sum()


@given(plans)
def test_blocks_do_not_straddle_multiples_of_the_block_size(plan: EpochPlan) -> None:
    for stream in range(plan.streams):
        for start, stop in plan.blocks(0, stream):
            assert start == stop or start // plan.block_rows == (stop - 1) // plan.block_rows


def test_epochs_and_seeds_differ() -> None:
    plan = EpochPlan(1000, 100, 2, 1000, seed=0)
    other = EpochPlan(1000, 100, 2, 1000, seed=1)
    assert not np.array_equal(plan.stream_order(0, 0), plan.stream_order(1, 0))
    assert not np.array_equal(plan.stream_order(0, 0), other.stream_order(0, 0))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_stream_is_served_by_one_rank(world_size: int) -> None:
    served = [s for rank in range(world_size) for s in local_streams(8, rank, world_size)]
    assert sorted(served) == list(range(8))


def test_a_world_that_does_not_divide_the_streams_is_refused() -> None:
    with pytest.raises(UserError, match=r"3 ranks.*data\.streams=8.*\[1, 2, 4, 8\]"):
        local_streams(8, 0, 3)


def test_the_order_of_blocks_and_the_order_inside_each_are_their_own() -> None:
    plan, other = EpochPlan(1000, 100, 1, 100, seed=0), EpochPlan(1000, 100, 1, 100, seed=1)
    blocks = plan.blocks(0, 0)
    assert blocks != other.blocks(0, 0) and sorted(blocks) == sorted(other.blocks(0, 0))
    assert blocks != plan.blocks(1, 0)
    orders = [plan.row_order(0, 0), plan.row_order(1, 0), other.row_order(0, 0)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_streams_have_orders_of_their_own() -> None:
    plan = EpochPlan(1000, 100, 2, 100, seed=0)
    assert not np.array_equal(plan.row_order(0, 0), plan.row_order(0, 1))
    assert plan.blocks(0, 0) != [(a - 500, b - 500) for a, b in plan.blocks(0, 1)]
