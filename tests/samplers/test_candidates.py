"""Uniform candidates, and the draws that choose them."""

import numpy as np
import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.candidates import non_interacted, uniform_candidates
from tests.support.small import graph_of

CPU = torch.device("cpu")


def _positives(graph: GraphArrays, user: int) -> set[int]:
    return set(graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]].tolist())


def test_non_interacted_enumerates_exactly_the_absent_items(tiny_graph: GraphArrays) -> None:
    for user in range(4):
        absent = sorted(set(range(4)) - _positives(tiny_graph, user))
        middles = (np.arange(len(absent)) + 0.5) / len(absent)
        users = np.full(len(absent), user)
        assert non_interacted(tiny_graph, users, users * 0, middles).tolist() == absent


def test_a_user_who_has_everything_gets_the_positive_back(tiny_graph: GraphArrays) -> None:
    got = non_interacted(tiny_graph, np.array([4, 4]), np.array([2, 3]), np.array([0.1, 0.9]))
    assert got.tolist() == [2, 3]


def test_non_interacted_is_uniform_on_a_larger_graph() -> None:
    generator = np.random.default_rng(0)
    pairs = sorted({(0, int(i)) for i in generator.integers(0, 50, 30)} | {(1, 49)})
    graph = graph_of(pairs, 2, 50)
    users = np.zeros(100_000, np.int64)
    got = non_interacted(graph, users, users, generator.random(100_000))
    absent = sorted(set(range(50)) - _positives(graph, 0))
    counts = np.bincount(got, minlength=50)
    assert set(np.flatnonzero(counts)) == set(absent)
    expected = 100_000 / len(absent)
    chi2 = ((counts[absent] - expected) ** 2 / expected).sum()
    assert chi2 < len(absent) + 5 * np.sqrt(2 * len(absent))


def _batch(users: list[int], items: list[int], streams: int = 1) -> Batch:
    weight = np.ones(len(users), np.float32)
    return Batch(0, 0, list(range(streams)), np.array(users), np.array(items), weight, len(users))


def test_draws_belong_to_their_stream_not_to_the_rank() -> None:
    both = Draws((7, 1, 2), [0, 1], 3, CPU)
    alone = Draws((7, 1, 2), [1], 3, CPU)
    assert np.array_equal(both.uniform(2)[3:], alone.uniform(2))
    assert torch.equal(both.normal(4)[3:], alone.normal(4))
    assert torch.equal(both.integers(9)[3:], alone.integers(9))
    assert torch.equal(both.beta(2, 3)[3:], alone.beta(2, 3))
    assert not torch.equal(
        Draws((7, 1, 3), [1], 3, CPU).normal(4), Draws((7, 1, 2), [1], 3, CPU).normal(4)
    )


def test_uniform_candidates_are_absent_items(tiny_graph: GraphArrays) -> None:
    batch = _batch([0, 1, 2, 3] * 8, [0, 1, 2, 0] * 8)
    got = uniform_candidates(tiny_graph, batch, Draws((0, 0, 0), [0], 32, CPU), 1)
    assert got.shape == (32, 1)
    assert all(
        i not in _positives(tiny_graph, u) for u, i in zip(batch.users, got[:, 0], strict=True)
    )
