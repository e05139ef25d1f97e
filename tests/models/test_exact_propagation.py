"""Exact propagation, in which each rank computes its own nodes."""

import numpy as np
import pytest
import torch

from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.models import exact_propagation
from cnsdiff_dist.models.lightgcn import full_block, propagate
from tests.support.ranks import run_ranks
from tests.support.small import small_config
from tests.support.tables import gather
from tests.support.trainers import new_trainer


def _own(data: str, layers: int, piece: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = small_config(data, "unused", model={"layers": layers, "fan_out": [2] * layers})
    # Pieces and blocks are so small that every table is cut in many places.
    exact_propagation.PIECE_BYTES = piece
    exact_propagation.ROWS, exact_propagation.EDGES = 7, 50
    trainer = new_trainer(config, join_world(60))
    tables, world = trainer.step.recommender.tables, trainer.world
    graph = trainer.loader._recommender._graph
    own = exact_propagation.propagate_own(tables, graph, layers, world)
    rows = torch.cat(
        [gather(weight, world)[: tables.rows[name]] for name, weight in tables.weights().items()]
    )
    none = np.empty(0, np.int64)
    return *own, propagate(full_block(graph, none, none), rows, layers)


@pytest.mark.distributed
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_each_rank_propagates_its_own_nodes_exactly(dataset: str, layers: int) -> None:
    ranks = run_ranks(4, _own, dataset, layers, 4 * 16 * 30)
    users, items = (torch.cat([rank[side] for rank in ranks]) for side in (0, 1))
    assert torch.allclose(torch.cat([users, items]), ranks[0][2], atol=1e-6)
