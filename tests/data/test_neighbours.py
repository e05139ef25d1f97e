"""Sampled propagation equals full propagation in expectation, and exactly where it must."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.neighbours import sample_hops
from cnsdiff_dist.models.lightgcn import Block, full_block, propagate, sampled_block
from tests.support.small import graph_of

DIM = 3


def _hub_graph() -> GraphArrays:
    """60 users and 41 items. Item 0 is a hub that all users but user 59 have.

    User 59 has nothing and nobody has item 40. Users 0..9 have many items besides the hub, the
    others one or two.
    """
    pairs = [(u, 0) for u in range(59)]
    pairs += [(u, i) for u in range(10) for i in range(1, 30) if (u + i) % 3]
    pairs += [(u, 1 + (u * 7) % 39) for u in range(10, 59)]
    return graph_of(sorted(set(pairs)), 60, 41)


def _ask(graph: GraphArrays) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(graph.users), np.arange(graph.items)


def _output(block: Block, users_ND: torch.Tensor, items_ND: torch.Tensor) -> torch.Tensor:
    ego_ND = torch.cat([users_ND[block.users], items_ND[block.items]])
    return propagate(block, ego_ND, len(block.hops) or 2)[block.position]


def _rows(graph: GraphArrays, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(graph.users, DIM, generator=generator),
        torch.randn(graph.items, DIM, generator=generator),
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fan_outs_that_cover_the_degrees_are_exact(layers: int) -> None:
    graph = _hub_graph()
    users, items = _ask(graph)
    block = sampled_block(graph, users, items, (60,) * layers, (0, 0, 0))
    rows = _rows(graph)
    ego = torch.cat(rows)
    whole = propagate(full_block(graph, users, items), ego, layers)
    assert torch.allclose(_output(block, *rows), whole, atol=1e-5)


@pytest.mark.parametrize("fan_out", [(1,), (2, 1), (3, 2), (2, 2, 2)])
def test_the_expectation_is_full_propagation(fan_out: tuple[int, ...]) -> None:
    """Each of some 300 numbers has a mean over 4,000 steps within 4.5 standard errors of the truth,
    and the samples vary."""
    graph = _hub_graph()
    users, items = _ask(graph)
    rows = _rows(graph)
    whole = propagate(full_block(graph, users, items), torch.cat(rows), len(fan_out))
    draws = torch.stack(
        [
            _output(sampled_block(graph, users, items, fan_out, (7, 0, step)), *rows)
            for step in range(4000)
        ]
    ).double()
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 1e-4).sum() > 50
    assert ((draws.mean(0) - whole).abs() <= 4.5 * error + 1e-6).all()


def test_the_gradient_is_that_of_the_sampled_operator() -> None:
    graph = _hub_graph()
    users, items = np.array([3, 59, 3]), np.array([0, 40, 5, 0])
    block = sampled_block(graph, users, items, (4, 3), (1, 2, 3))
    nodes = len(block.users) + len(block.items)
    ego = torch.randn(nodes, DIM, dtype=torch.float64, requires_grad=True)
    hops = tuple(
        type(hop)(hop.rows, hop.operator.double(), hop.transposed.double()) for hop in block.hops
    )
    block = Block(block.users, block.items, block.position, block.targets, None, hops)
    assert torch.autograd.gradcheck(lambda x: propagate(block, x, 2), ego)


def test_a_row_sees_the_same_sample_in_any_batch() -> None:
    """This makes the world size and duplicates irrelevant."""
    graph, rows = _hub_graph(), _rows(_hub_graph())
    key = (5, 1, 9)
    users, items = np.array([1, 2, 2, 30]), np.array([0, 0, 7])
    together = _output(sampled_block(graph, users, items, (3, 2), key), *rows)
    alone = [
        _output(sampled_block(graph, users[i : i + 1], items[:0], (3, 2), key), *rows)
        for i in range(4)
    ]
    alone += [
        _output(sampled_block(graph, users[:0], items[i : i + 1], (3, 2), key), *rows)
        for i in range(3)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    other = _output(sampled_block(graph, users, items, (3, 2), (5, 1, 10)), *rows)
    assert not torch.allclose(together, other)


@given(st.integers(0, 2**31), st.integers(1, 70), st.integers(1, 7))
def test_a_sample_is_of_distinct_neighbours(seed: int, degree: int, fan: int) -> None:
    graph = graph_of([(0, i) for i in range(degree)], 2, degree + 1)
    (hop,) = sample_hops(graph, np.array([0, 1]), (fan,), (seed, 0, 0))
    assert hop.indptr.tolist() == [0, min(degree, fan), min(degree, fan)]
    assert len(set(hop.columns.tolist())) == min(degree, fan)
    assert hop.columns.min() >= 2 and hop.columns.max() < 2 + degree
    weight = degree / min(degree, fan) / degree**0.5
    assert np.allclose(hop.values, weight, rtol=1e-6)


def test_a_hub_costs_no_more_than_its_fan_out() -> None:
    class Counting(np.ndarray):
        read = 0

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            Counting.read += np.size(index)
            return np.asarray(self)[index]

    graph = graph_of([(u, 0) for u in range(5000)], 5000, 1)
    graph = GraphArrays(
        *(
            array.view(Counting)
            for array in (graph.user_indptr, graph.user_items, graph.item_indptr, graph.item_users)
        )
    )
    sample_hops(graph, np.array([5000]), (10, 5), (0, 0, 0))
    assert Counting.read < 200


def test_no_layers_need_no_graph() -> None:
    graph = _hub_graph()
    block = sampled_block(graph, np.array([4, 4, 2]), np.array([1]), (), (0, 0, 0))
    assert block.users.tolist() == [2, 4] and block.items.tolist() == [1]
    assert block.position.tolist() == [1, 1, 0, 2] and block.targets is None
    ego = torch.randn(3, DIM)
    assert propagate(block, ego, 0) is ego
