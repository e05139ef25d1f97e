"""Sharded, fused tables against plain autograd and torch-free optimizer formulas."""

from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.distributed.embedding_tables import initial_rows
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.sections import Tables
from tests.support.ranks import run_ranks
from tests.support.tables import gather

USERS, ITEMS, DIM, STEPS, STREAMS = 11, 7, 4, 5, 4


def _batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two half batches: distinct users, distinct items, and a target for each row."""
    generator = torch.Generator().manual_seed(step)
    halves = []
    for _ in range(2):
        users = torch.randperm(USERS, generator=generator)[:5]
        items = torch.randperm(ITEMS, generator=generator)[:4]
        halves.append((users, items, torch.randn(9, DIM, generator=generator)))
    return halves


def _train_sharded(config: Tables) -> dict[str, torch.Tensor]:
    """Train on this rank's share of the two halves; the full tables after some steps."""
    world = join_world(60)
    tables = ShardedTables(USERS, ITEMS, DIM, config, STREAMS, seed=3, world=world)
    for step in range(STEPS):
        mine = _batches(step)[world.rank :: world.size]
        if world.size == 1:  # a step has one lookup, of distinct ids
            users, inverse_u = torch.cat([half[0] for half in mine]).unique(return_inverse=True)
            items, inverse_i = torch.cat([half[1] for half in mine]).unique(return_inverse=True)
            rows = tables.lookup(users, items)
            found = torch.cat(
                [
                    rows[: len(users)][inverse_u[:5]],
                    rows[len(users) :][inverse_i[:4]],
                    rows[: len(users)][inverse_u[5:]],
                    rows[len(users) :][inverse_i[4:]],
                ]
            )
            target = torch.cat([half[2] for half in mine])
        else:
            found, target = tables.lookup(*mine[0][:2]), mine[0][2]
        # The mean over both halves, whoever computes them.
        ((found - target).square().sum() / 2 * world.size).backward()
    return _whole(tables, world)


def _whole(tables: ShardedTables, world: World) -> dict[str, torch.Tensor]:
    """The tables without their padding."""
    return {
        name: gather(tensor, world)[: tables.rows[name]]
        for name, tensor in tables.weights().items()
    }


def _train_plainly(config: Tables) -> dict[str, torch.Tensor]:
    """The same objective by autograd on dense tables and the optimizers' formulas."""
    weights = {
        name: initial_rows(name, 0, rows, DIM, config.init_std, 3)
        for name, rows in (("user", USERS), ("item", ITEMS))
    }
    states = {name: torch.zeros(len(w), DIM) for name, w in weights.items()}
    for step in range(STEPS):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        loss = sum(
            (torch.cat([leaves["user"][users], leaves["item"][items]]) - target).square().sum() / 2
            for users, items, target in _batches(step)
        )
        loss.backward()  # type: ignore[union-attr]
        for name, leaf in leaves.items():
            weights[name] = _update(weights[name], leaf.grad, states[name], config)
    return weights


def _update(weight: torch.Tensor, grad: Any, state: torch.Tensor, config: Tables) -> torch.Tensor:
    if config.optimizer == "sgd":
        return weight - config.lr * grad
    square = grad.square()
    if config.optimizer == "rowwise_adagrad":
        square = square.mean(1, keepdim=True).expand_as(grad)
    state += square
    return weight - config.lr * grad / (state.sqrt() + config.eps)


OPTIMIZERS = ["rowwise_adagrad", "adagrad", "sgd"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_tables_equal_plain_autograd(optimizer: Any, world: World) -> None:
    config = Tables(optimizer=optimizer, lr=0.1)
    got, expected = _train_sharded(config), _train_plainly(config)
    for name in expected:
        assert torch.allclose(got[name], expected[name], atol=1e-6)


def test_a_table_may_be_of_half_precision(world: World) -> None:
    """fp16 keeps 11 bits: each of 5 updates rounds the rows to within 2^-11 of themselves."""
    config = Tables(lr=0.1, user_dtype="fp16")
    tables = ShardedTables(USERS, ITEMS, DIM, config, STREAMS, 3, world)
    kinds = {
        name: weight.local_shards()[0].tensor.dtype for name, weight in tables.weights().items()
    }
    assert kinds == {"user": torch.float16, "item": torch.float32}
    assert tables.lookup(torch.tensor([1]), torch.tensor([1])).dtype == torch.float32
    got, expected = _train_sharded(config), _train_plainly(config)
    assert torch.allclose(got["user"], expected["user"], atol=5 * 2**-11)
    assert not torch.equal(got["user"], expected["user"])


@pytest.mark.parametrize(
    "values", [{"optimizer": "adam"}, {"optimizer": "partial_rowwise_adam"}, {"placement": "uvm"}]
)
def test_what_needs_a_gpu_is_refused_without_one(values: Any, world: World) -> None:
    with pytest.raises(UserError, match=f"tables.{next(iter(values))}=.* needs a GPU"):
        ShardedTables(USERS, ITEMS, DIM, Tables(**values), STREAMS, 3, world)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "sharding"), [(2, "row_wise"), (2, "table_wise"), (2, "column_wise")]
)
def test_two_ranks_equal_unsharded(size: int, sharding: Any) -> None:
    config = Tables(
        lr=0.1,
        sharding=sharding,
        optimizer="adagrad" if sharding == "column_wise" else "rowwise_adagrad",
    )
    expected = _train_plainly(config)
    for got in run_ranks(size, _train_sharded, config):
        for name in expected:
            assert torch.allclose(got[name], expected[name], atol=1e-6)


@pytest.mark.parametrize(("table", "bad"), [("user", USERS), ("item", ITEMS), ("user", -1)])
def test_ids_out_of_range_are_refused(world: World, table: str, bad: int) -> None:
    tables = ShardedTables(USERS, ITEMS, DIM, Tables(), STREAMS, 0, world)
    tables.refuse_out_of_range(table, np.array([0, 1]))
    with pytest.raises(UserError, match=f"{table} ids must lie in"):
        tables.refuse_out_of_range(table, np.array([0, bad]))


def _few_rows() -> tuple[torch.Tensor, torch.Tensor, int]:
    """3 items on 4 ranks; each rank trains user and item number ``rank % 3`` towards 1."""
    world = join_world(60)
    tables = ShardedTables(USERS, 3, DIM, Tables(lr=0.1), STREAMS, 0, world)
    mine = torch.tensor([world.rank % 3])
    for _ in range(3):
        (tables.lookup(mine, mine) - 1).square().sum().backward()
    return _whole(tables, world)["item"], tables.own_rows("item"), len(world.own_rows(3))


@pytest.mark.distributed
def test_a_rank_without_rows_of_a_table_trains_with_the_others() -> None:
    ranks = run_ranks(4, _few_rows)
    assert [own for _, _, own in ranks] == [1, 1, 1, 0]
    assert torch.equal(torch.cat([rows for _, rows, _ in ranks]), ranks[0][0])
    assert (ranks[0][0] > 0.1).all()


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "column_wise"])
def test_each_rank_reads_its_own_rows_however_the_table_is_sharded(sharding: Any) -> None:
    ranks = run_ranks(3, _own_rows, sharding)
    for name in ("user", "item"):
        assert torch.equal(torch.cat([own[name] for _, own in ranks]), ranks[0][0][name])


def _own_rows(sharding: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    world = join_world(60)
    config = Tables(sharding=sharding, optimizer="adagrad")
    tables = ShardedTables(USERS, ITEMS, 12, config, 3, seed=3, world=world)
    return _whole(tables, world), {name: tables.own_rows(name) for name in ("user", "item")}


def test_first_rows_do_not_depend_on_the_cut() -> None:
    whole = initial_rows("user", 0, 10_000, 4, 0.1, seed=5)
    assert torch.equal(initial_rows("user", 4000, 9000, 4, 0.1, seed=5), whole[4000:9000])
    assert not torch.equal(initial_rows("item", 0, 10, 4, 0.1, seed=5), whole[:10])
    assert not torch.equal(initial_rows("user", 0, 10, 4, 0.1, seed=6), whole[:10])
    assert whole.std().item() == pytest.approx(0.1, rel=0.02)


def test_learning_rate_scale_reaches_the_fused_update(world: World) -> None:
    tables = ShardedTables(USERS, ITEMS, DIM, Tables(optimizer="sgd", lr=1.0), STREAMS, 0, world)
    before = _whole(tables, world)["user"]
    tables.scale_lr(0.25)
    tables.lookup(torch.arange(USERS), torch.arange(ITEMS)).sum().backward()
    assert torch.allclose(_whole(tables, world)["user"], before - 0.25)


def _first_tables(sharding: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    world = join_world(60)
    config = Tables(sharding=sharding, optimizer="adagrad")
    tables = ShardedTables(USERS, ITEMS, 16, config, STREAMS, seed=3, world=world)
    columns = [
        shard.metadata.shard_offsets[1]
        for sharded in tables.weights().values()
        for shard in sharded.local_shards()
    ]
    return _whole(tables, world), columns


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_two_ranks_start_from_the_same_tables(sharding: str) -> None:
    ranks = run_ranks(2, _first_tables, sharding)
    assert any(columns != [0, 0] for _, columns in ranks) == (sharding == "column_wise")
    for tables, _ in ranks:
        for name, rows in (("user", USERS), ("item", ITEMS)):
            assert torch.equal(tables[name], initial_rows(name, 0, rows, 16, 0.01, 3))


def test_cpu_kernels_sum_bags_of_one_row(world: World) -> None:
    """Looking rows up one by one gives the same numbers, but its backward is many times slower."""
    tables = ShardedTables(USERS, ITEMS, DIM, Tables(), STREAMS, seed=3, world=world)
    with torch.profiler.profile() as profile:
        tables.lookup(torch.arange(USERS), torch.arange(ITEMS)).sum().backward()
    kernels = [e.key for e in profile.key_averages() if e.key.startswith("fbgemm::split_embedding")]
    assert any("backward" in name for name in kernels)
    assert not any("nobag" in name for name in kernels)
