"""Negatives by popularity: p(j) ~ degree(j)^gamma among what the user has not interacted with.

Mikolov et al., "Distributed Representations of Words and Phrases", NeurIPS 2013 (gamma 3/4).
"""

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.uniform import UniformSampler

_REDRAWS = 8


class PopularitySampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, gamma: float) -> None:
        super().__init__(graph, count)
        self._train = Interactions(graph.user_indptr, graph.user_items)
        self._cumulative = np.cumsum(np.diff(graph.item_indptr).astype(np.float64) ** gamma)

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        """A draw is a bisection; one that hits a train item of the user is drawn again, and
        after that many hits is uniform."""
        uniform = super().candidates(batch, draws).ravel()
        users = np.repeat(batch.users, self._count)
        items, open_ = uniform, np.ones(len(uniform), bool)
        for _ in range(_REDRAWS):
            draw = draws.uniform(self._count).ravel() * self._cumulative[-1]
            drawn = np.searchsorted(self._cumulative, draw, side="right")
            fresh = open_ & ~self._train.contain(users, drawn)
            items, open_ = np.where(fresh, drawn, items), open_ & ~fresh
        return items.reshape(len(batch.users), self._count)
