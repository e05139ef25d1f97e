"""Sharded, fused tables against plain autograd and torch-free optimizer formulas."""

from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.config import Tables
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.models.tables import initial_rows
from cnsdiff_dist.parallel.sparse import ShardedTables
from cnsdiff_dist.world import World, join_world
from tests.ranks import run_ranks

USERS, ITEMS, DIM, STEPS = 11, 7, 4, 5


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
    """Each rank of W takes its share of the two halves; the full tables after some steps."""
    world = join_world(60)
    tables = ShardedTables(USERS, ITEMS, DIM, config, seed=3, world=world)
    for step in range(STEPS):
        mine = _batches(step)[world.rank :: world.size]
        if world.size == 1:  # one lookup a step: distinct ids, rows weighted by their gradient
            users, inverse_u = torch.cat([half[0] for half in mine]).unique(return_inverse=True)
            items, inverse_i = torch.cat([half[1] for half in mine]).unique(return_inverse=True)
            rows = tables.lookup(users, items)
            found = torch.cat(
                [rows[: len(users)][inverse_u[:5]], rows[len(users) :][inverse_i[:4]],
                 rows[: len(users)][inverse_u[5:]], rows[len(users) :][inverse_i[4:]]]
            )  # fmt: skip
            target = torch.cat([half[2] for half in mine])
        else:
            found, target = tables.lookup(*mine[0][:2]), mine[0][2]
        # The mean over both halves, whoever computes them.
        ((found - target).square().sum() / 2 * world.size).backward()
    return {name: gather(tensor, world) for name, tensor in tables.weights().items()}


def gather(sharded: Any, world: World) -> torch.Tensor:
    """The whole table of a ShardedTensor, on every rank."""
    whole = torch.zeros(sharded.size())
    for shard in sharded.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = shard.tensor.detach()
    return world.sum(whole)


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
    tables = ShardedTables(USERS, ITEMS, DIM, Tables(), 0, world)
    tables.refuse_out_of_range(table, np.array([0, 1]))
    with pytest.raises(UserError, match=f"{table} ids must lie in"):
        tables.refuse_out_of_range(table, np.array([0, bad]))


def test_more_ranks_than_rows_are_refused() -> None:
    world = World(0, 4, torch.device("cpu"), 4)
    with pytest.raises(UserError, match="4 ranks are too many for the item table's 5 rows"):
        ShardedTables(USERS, 5, DIM, Tables(), 0, world)


def test_first_rows_do_not_depend_on_the_cut() -> None:
    whole = initial_rows("user", 0, 10_000, 4, 0.1, seed=5)
    assert torch.equal(initial_rows("user", 4000, 9000, 4, 0.1, seed=5), whole[4000:9000])
    assert not torch.equal(initial_rows("item", 0, 10, 4, 0.1, seed=5), whole[:10])
    assert not torch.equal(initial_rows("user", 0, 10, 4, 0.1, seed=6), whole[:10])
    assert whole.std().item() == pytest.approx(0.1, rel=0.02)


def test_learning_rate_scale_reaches_the_fused_update(world: World) -> None:
    tables = ShardedTables(USERS, ITEMS, DIM, Tables(optimizer="sgd", lr=1.0), 0, world)
    before = gather(tables.weights()["user"], world)
    tables.scale_lr(0.25)
    tables.lookup(torch.arange(USERS), torch.arange(ITEMS)).sum().backward()
    assert torch.allclose(gather(tables.weights()["user"], world), before - 0.25)


def _first_tables(sharding: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    world = join_world(60)
    config = Tables(sharding=sharding, optimizer="adagrad")
    tables = ShardedTables(USERS, ITEMS, 16, config, seed=3, world=world)
    columns = [
        shard.metadata.shard_offsets[1]
        for sharded in tables.weights().values()
        for shard in sharded.local_shards()
    ]
    return {name: gather(tensor, world) for name, tensor in tables.weights().items()}, columns


@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_two_ranks_start_from_the_same_tables(sharding: str) -> None:
    ranks = run_ranks(2, _first_tables, sharding)
    assert any(columns != [0, 0] for _, columns in ranks) == (sharding == "column_wise")
    for tables, _ in ranks:
        for name, rows in (("user", USERS), ("item", ITEMS)):
            assert torch.equal(tables[name], initial_rows(name, 0, rows, 16, 0.01, 3))
