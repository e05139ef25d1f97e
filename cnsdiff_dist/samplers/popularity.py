"""Negatives by popularity: p(j) ~ degree(j)^gamma among what the user has not interacted with.

Mikolov et al., "Distributed Representations of Words and Phrases", NeurIPS 2013 (gamma 3/4).
"""

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.draws import Draws
from cnsdiff_dist.samplers.uniform import UniformSampler

_REDRAWS = 8


class PopularitySampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, gamma: float) -> None:
        super().__init__(graph, count)
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
            fresh = open_ & ~interacted(self._graph, users, drawn)
            items, open_ = np.where(fresh, drawn, items), open_ & ~fresh
        return items.reshape(len(batch.users), self._count)


def interacted(
    graph: GraphArrays, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether each pair is a train interaction, by bisection of the user's row, bool [B]."""
    low = np.asarray(graph.user_indptr[users])
    high = end = np.asarray(graph.user_indptr[users + 1])
    last = max(len(graph.user_items) - 1, 0)
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        open_, middle = low < high, (low + high) // 2
        before = open_ & (graph.user_items[np.minimum(middle, last)] < items)
        low, high = np.where(before, middle + 1, low), np.where(open_ & ~before, middle, high)
    return (low < end) & (graph.user_items[np.minimum(low, last)] == items)
