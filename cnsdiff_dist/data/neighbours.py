"""Neighbour sampling on the memory-mapped CSR: the part of the graph that a batch needs.

LightGCN's output of a node is a sum over paths, and each hop is sampled on its own: a node of
degree d > f keeps f of its neighbours, each with probability f / d and weighted d / f, so that
the sampled Â has expectation Â hop by hop, and the product of independent hops that of the
product. A node of degree d <= f keeps all of them: its hop is exact.

Which neighbours a node keeps is a hash of (seed, epoch, step, hop, node): all rows of a batch,
on every rank, see the same sample of a node, so neither duplicates nor the world size change
what is trained, and no generator state is kept.

Nodes are numbered users first: user u is node u, item i is node U + i.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.graph import GraphArrays

Ids = npt.NDArray[np.int64]
_PURPOSE = 2  # plan.py and draws.py have others, so that no two share a stream


@dataclass(frozen=True)
class Hop:
    """Rows of a sampled Â in CSR. ``nodes`` [R] are the row's nodes; ``columns`` are nodes."""

    nodes: Ids
    indptr: Ids
    columns: Ids
    values: npt.NDArray[np.float32]


def sample_hops(
    graph: GraphArrays, nodes: Ids, fan_out: tuple[int, ...], key: tuple[int, int, int]
) -> list[Hop]:
    """A hop per entry of ``fan_out``: the first has the rows ``nodes`` (distinct), each next one
    the distinct columns of the hop before, ascending.

    ``key`` is (seed, epoch, step).
    """
    hops = []
    for number, fan in enumerate(fan_out):
        state = np.random.SeedSequence((_PURPOSE, *key, number)).generate_state(1, np.uint64)[0]
        hops.append(_sample(graph, nodes, fan, _hashed(nodes, state)))
        if number + 1 < len(fan_out):
            nodes = np.unique(hops[-1].columns)
    return hops


def _sample(graph: GraphArrays, nodes: Ids, fan: int, uniform: npt.NDArray[np.float64]) -> Hop:
    """Up to ``fan`` neighbours of each node: from a random start, every (d / f)-th of its row.

    That is systematic sampling: each neighbour is kept with probability f / d, none twice, at
    the price of one random number a node and without touching the rest of the row.
    """
    users = graph.users
    start, degree = _rows(graph, nodes)
    count = np.minimum(degree, fan)
    indptr = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(len(nodes)), count)
    place = np.arange(len(row)) - indptr[row]
    step = degree / np.maximum(count, 1)
    edge = start[row] + ((place + uniform[row]) * step[row]).astype(np.int64)
    of_user = nodes[row] < users
    columns = np.empty(len(row), np.int64)
    columns[of_user] = graph.user_items[edge[of_user]]
    columns[of_user] += users
    columns[~of_user] = graph.item_users[edge[~of_user]]
    # (d / f) x 1 / sqrt(d d'): the degree of a neighbour is at least 1, since it has this node.
    scale = np.sqrt(degree) / np.maximum(count, 1)
    values = scale[row] / np.sqrt(_rows(graph, columns)[1])
    return Hop(nodes, indptr, columns, values.astype(np.float32))


def _rows(graph: GraphArrays, nodes: Ids) -> tuple[Ids, Ids]:
    """Where each node's row of its CSR starts, and its degree, int64 [n] each."""
    users = graph.users
    start, stop = np.empty_like(nodes), np.empty_like(nodes)
    of_user = nodes < users
    sides = ((of_user, graph.user_indptr, 0), (~of_user, graph.item_indptr, users))
    for side, indptr, first in sides:
        rows = nodes[side] - first
        start[side], stop[side] = indptr[rows], indptr[rows + 1]
    return start, stop - start


def _hashed(nodes: Ids, state: Any) -> npt.NDArray[np.float64]:
    """Uniform in [0, 1) by node, in steps of 2^-32 (Steele et al., "Fast splittable pseudorandom
    number generators", OOPSLA 2014: the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        z = (nodes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + state
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.float64) * 2.0**-32
