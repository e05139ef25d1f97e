"""Neighbour sampling on the memory-mapped CSR: the part of the graph that a batch needs.

LightGCN's output of a node is a sum over paths, so each hop can be sampled independently. With
fan-out f, a node of degree d > f keeps f of its neighbours, each with probability f / d and
weighted by d / f. The expectation of a sampled Â is then Â, and the expectation of the product of
independent hops is the product of their expectations. A node of degree d <= f keeps all its
neighbours, so its hop is exact.

A hash of (seed, epoch, step, hop, node) decides which neighbours a node keeps. All rows of a
batch, on every rank, see the same sample of a node; neither duplicates nor the world size change
what is trained, and no generator state is kept.

Nodes are numbered users first: user u is node u, and item i is node U + i.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.graph import GraphArrays

Ids = npt.NDArray[np.int64]
_PURPOSE = 2  # epoch_plan and draws have others, so that no two share random numbers.


@dataclass(frozen=True)
class Hop:
    """Some rows of a sampled Â in CSR.

    Attributes:
        nodes: the node of each row, int64 [rows].
        indptr: int64 [rows + 1].
        columns: the sampled neighbours, as nodes, int64 [edges].
        values: the entries of Â times d / f, float32 [edges].
    """

    nodes: Ids
    indptr: Ids
    columns: Ids
    values: npt.NDArray[np.float32]


def sample_hops(
    graph: GraphArrays, nodes: Ids, fan_out: tuple[int, ...], key: tuple[int, int, int]
) -> list[Hop]:
    """Sample a hop per entry of ``fan_out``.

    Args:
        nodes: the distinct nodes whose output is asked for, int64 [Q]: the rows of the first hop.
        fan_out: the neighbours that a node keeps in each hop.
        key: (seed, epoch, step).

    Returns:
        The hops. The rows of each next hop are the distinct columns of the hop before, ascending.
    """
    hops = []
    for hop, fan in enumerate(fan_out):
        state = np.random.SeedSequence((_PURPOSE, *key, hop)).generate_state(1, np.uint64)[0]
        hops.append(_sample(graph, nodes, fan, _hashed(nodes, state)))
        if hop + 1 < len(fan_out):
            nodes = np.unique(hops[-1].columns)
    return hops


def _sample(graph: GraphArrays, nodes: Ids, fan: int, uniform: npt.NDArray[np.float64]) -> Hop:
    """Sample up to ``fan`` neighbours of each node; ``uniform`` has a number in [0, 1) per node.

    Systematic sampling takes every (d / f)-th neighbour of a row from a random start. It keeps
    each neighbour with probability f / d and none twice. It needs one random number per node and
    does not read the rest of the row.
    """
    start, degree = _csr_rows(graph, nodes)
    count = np.minimum(degree, fan)
    indptr = np.concatenate([[0], np.cumsum(count)])
    row = np.repeat(np.arange(len(nodes)), count)
    nth = np.arange(len(row)) - indptr[row]
    step = degree / np.maximum(count, 1)
    edge = start[row] + ((nth + uniform[row]) * step[row]).astype(np.int64)
    columns = _neighbours(graph, nodes[row], edge)
    # (d / f) x 1 / sqrt(d d'), where d' >= 1 because the neighbour has this node.
    scale = np.sqrt(degree) / np.maximum(count, 1)
    values = scale[row] / np.sqrt(_csr_rows(graph, columns)[1])
    return Hop(nodes, indptr, columns, values.astype(np.float32))


def _neighbours(graph: GraphArrays, nodes: Ids, edges: Ids) -> Ids:
    """Return the node at the other end of each edge, a position in the index array of its node."""
    of_user = nodes < graph.users
    others = np.empty(len(nodes), np.int64)
    others[of_user] = graph.user_items[edges[of_user]]
    others[of_user] += graph.users
    others[~of_user] = graph.item_users[edges[~of_user]]
    return others


def _csr_rows(graph: GraphArrays, nodes: Ids) -> tuple[Ids, Ids]:
    """Return the start of each node's row in its index array, and its degree, int64 [nodes]."""
    users = graph.users
    start, stop = np.empty_like(nodes), np.empty_like(nodes)
    of_user = nodes < users
    sides = ((of_user, graph.user_indptr, 0), (~of_user, graph.item_indptr, users))
    for side, indptr, first in sides:
        rows = nodes[side] - first
        start[side], stop[side] = indptr[rows], indptr[rows + 1]
    return start, stop - start


def _hashed(nodes: Ids, state: Any) -> npt.NDArray[np.float64]:
    """Hash each node to a number that is uniform in [0, 1), in steps of 2^-32.

    The hash is the finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number
    generators", OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        z = (nodes.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + state
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.float64) * 2.0**-32
