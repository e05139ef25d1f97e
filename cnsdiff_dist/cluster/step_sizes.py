"""How many distinct rows and edges a rank's step touches: measured on a dataset, or bounded by
counts."""

from dataclasses import dataclass

import numpy as np

from cnsdiff_dist.cluster.hardware import Cluster
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.models.lightgcn import sampled_block
from cnsdiff_dist.models.recommender import is_sampled
from cnsdiff_dist.samplers.protocol import Footprint
from cnsdiff_dist.samplers.registry import SAMPLERS


@dataclass(frozen=True)
class Sizes:
    """Of the dataset, and of the block that a rank needs for one step."""

    users: int
    items: int
    edges: int
    block_nodes: int
    block_edges: int


def footprint_of(config: Config) -> Footprint:
    """What the negatives of a row cost, as its sampler says."""
    width = config.train.batch // config.data.streams
    sampler = SAMPLERS[config.negatives.kind]
    return sampler.footprint(config.negatives, config.generator, width)


def needs_own_rows_only(config: Config, nodes: int) -> bool:
    """Whether a step looks up the rows of its own block, not those of the whole graph."""
    return config.model.layers == 0 or is_sampled(config.model, nodes)


def measured_sizes(config: Config, cluster: Cluster, graph: GraphArrays, steps: int = 3) -> Sizes:
    """The mean block of some steps, sampled as the loader does it, with positives by
    popularity."""
    edges = len(graph.user_items)
    if not needs_own_rows_only(config, graph.users + graph.items):
        return bounded_sizes(config, cluster, graph.users, graph.items, edges)
    generator, found = np.random.default_rng(0), []
    for step in range(steps):
        users, items = _step_ids(config, cluster, graph, generator)
        fan_out = config.model.fan_out[: config.model.layers]
        block = sampled_block(graph, users, items, fan_out, (0, 0, step))
        nonzero = sum(hop.operator.values().numel() for hop in block.hops)
        found.append((len(block.users) + len(block.items), nonzero))
    nodes, block_edges = np.mean(found, axis=0).round().astype(int).tolist()
    return Sizes(graph.users, graph.items, edges, nodes, block_edges)


def _step_ids(
    config: Config, cluster: Cluster, graph: GraphArrays, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The users and items that a rank looks up in a step."""
    rows = max(config.train.batch // cluster.ranks, 1)
    edges = generator.integers(len(graph.user_items), size=rows)
    users = np.searchsorted(graph.user_indptr, edges, side="right") - 1
    others = generator.integers(graph.items, size=rows * footprint_of(config).candidates)
    return users, np.concatenate([np.asarray(graph.user_items[edges], np.int64), others])


def bounded_sizes(config: Config, cluster: Cluster, users: int, items: int, edges: int) -> Sizes:
    """An upper bound from counts alone: as if no node of a block were there twice."""
    nodes = users + items
    if not needs_own_rows_only(config, nodes):
        return Sizes(users, items, edges, nodes, 2 * edges * config.model.layers)
    rows = max(config.train.batch // cluster.ranks, 1)
    hop = rows * (2 + footprint_of(config).candidates)
    total, block_edges = hop, 0
    for fan in config.model.fan_out[: config.model.layers]:
        hop = min(hop * fan, 2 * edges)
        total, block_edges = total + hop, block_edges + hop
    return Sizes(users, items, edges, min(total, nodes), block_edges)
