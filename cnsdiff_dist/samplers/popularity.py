"""Negatives by popularity: p(j) ~ degree(j)^gamma among what the user has not interacted with.

Mikolov et al., "Distributed Representations of Words and Phrases", NeurIPS 2013 (gamma 3/4).
"""

from typing import Literal

import numpy as np
from pydantic import Field

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.protocol import Ids, Surroundings
from cnsdiff_dist.samplers.uniform import CountSettings, DrawnSampler

_REDRAWS = 8


class PopularitySettings(CountSettings):
    kind: Literal["popularity"] = "popularity"
    gamma: float = Field(0.75, ge=0, description="p(i) ~ degree(i)^gamma")


class PopularitySampler(DrawnSampler[PopularitySettings]):
    settings_type = PopularitySettings

    def __init__(self, settings: PopularitySettings, around: Surroundings) -> None:
        super().__init__(settings, around)
        graph = around.graph
        self._train = Interactions(graph.user_indptr, graph.user_items)
        degree = np.diff(graph.item_indptr).astype(np.float64)
        self._cumulative = np.cumsum(degree**settings.gamma)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        """Draw each item by bisection; one that hits a train item of its user is drawn again,
        and after 8 such hits the item is a uniform one."""
        uniform = super().candidates(batch, draws)
        users = np.repeat(batch.users, self.settings.count)
        items, open_ = uniform.ravel(), np.ones(uniform.size, bool)
        for _ in range(_REDRAWS):
            draw = draws.uniform(self.settings.count).ravel() * self._cumulative[-1]
            drawn = np.searchsorted(self._cumulative, draw, side="right")
            fresh = open_ & ~self._train.contain(users, drawn)
            items, open_ = np.where(fresh, drawn, items), open_ & ~fresh
        return items.reshape(uniform.shape)
