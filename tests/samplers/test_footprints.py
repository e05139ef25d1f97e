"""What every sampler says of itself is what it does, and what the planner believes of it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cnsdiff_dist.cluster.cost_model import Job
from cnsdiff_dist.cluster.hardware import Cluster
from cnsdiff_dist.cluster.step_sizes import Sizes, footprint_of
from cnsdiff_dist.config import Config, parse_config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.samplers.protocol import EncodedBatch, Sampler
from cnsdiff_dist.samplers.registry import SAMPLERS
from cnsdiff_dist.training.components import make_sampler
from tests.support.small import graph_of

STREAMS, WIDTH, DIM, ENVIRONMENTS = 2, 12, 8, 3
ROWS = STREAMS * WIDTH
VARIANTS = [
    *({"kind": kind} for kind in SAMPLERS),
    {"kind": "uniform", "count": 3},
    {"kind": "popularity", "count": 2},
    {"kind": "mixed", "count": 4},
    {"kind": "dns", "candidates": 5},
    {"kind": "cnsdiff", "share": "row"},
    {"kind": "cnsdiff", "margin": None},
]


def _config(negatives: dict[str, Any]) -> Config:
    tree = {
        "model": {"dim": DIM},
        "train": {"batch": ROWS},
        "data": {"streams": STREAMS},
        "generator": {"hidden": 16, "levels": (10, 14, 18), "train_share": 0.4},
        "negatives": negatives,
    }
    return parse_config(tree, "test")


def _encoded(sampler: Sampler[Any], draws: Draws) -> EncodedBatch:
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randint(n, (ROWS,), generator=generator) for n in (9, 20))
    weight = np.ones(ROWS, np.float32)
    batch = Batch(0, 0, list(range(STREAMS)), users.numpy(), items.numpy(), weight, ROWS)
    candidates = sampler.candidates(batch, draws)
    vectors = torch.randn(20, DIM, generator=generator)
    return EncodedBatch(
        batch,
        candidates,
        torch.randn(ROWS, DIM, generator=generator),
        vectors[items],
        vectors[candidates],
        positive_item_B=items,
        candidate_item_BM=torch.from_numpy(candidates),
        environment_B=torch.zeros(ROWS, dtype=torch.int64),
        weight_B=torch.ones(ROWS),
        groups=STREAMS,
    )


@pytest.fixture(params=VARIANTS, ids=lambda keys: "-".join(map(str, keys.values())))
def config(request: pytest.FixtureRequest) -> Config:
    return _config(request.param)


def test_a_sampler_looks_up_and_makes_what_it_says(config: Config, world: World) -> None:
    pairs = np.random.default_rng(0).integers(0, [9, 20], (60, 2))
    graph = graph_of(sorted({(int(u), int(i)) for u, i in pairs}), 9, 20)
    sampler = make_sampler(config, graph, ENVIRONMENTS, world)
    draws = Draws((0, 0, 0), list(range(STREAMS)), WIDTH, torch.device("cpu"))
    encoded = _encoded(sampler, draws)
    made = sampler.negatives(encoded, draws, 0.5)
    said = footprint_of(config)
    assert encoded.candidates.shape == (ROWS, said.candidates)
    assert made.vector_BND.shape == (ROWS, said.own, DIM)
    assert (made.pool.vector_GPD.shape[1] if made.pool else 0) == said.pool
    assert made.logits(encoded.user_BD, cosine=True).shape == (ROWS, said.own + said.pool)


def test_the_planner_counts_the_network_that_is_trained(config: Config, world: World) -> None:
    graph = graph_of([(0, 0), (1, 1)], 2, 2)
    network: nn.Module | None = make_sampler(config, graph, 5, world).network
    parameters = sum(parameter.numel() for parameter in network.parameters()) if network else 0
    sizes = Sizes(100, 100, 1000, 200, 4000)
    assert Job(config, Cluster("cpu", 1, 1), sizes).network_parameters == parameters
