"""The model a run trains: sharded tables under a LightGCN encoder.

Shapes: B rows, D embedding dim, N nodes of a block (users first); R this rank's own rows.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models import losses
from cnsdiff_dist.models.exact_propagation import propagate_own
from cnsdiff_dist.models.lightgcn import Block, full_block, full_position, propagate, sampled_block

Ids = npt.NDArray[np.int64]
AUTO_NODES = 100_000
"""Up to this many nodes ``model.propagation=auto`` propagates over the whole graph."""


class Recommender:
    def __init__(self, config: Config, graph: GraphArrays, world: World) -> None:
        self.tables = ShardedTables(
            graph.users, graph.items, config.model.dim, config.tables, config.data.streams,
            config.run.seed, world,
        )  # fmt: skip
        self._layers, self._fan_out = config.model.layers, config.model.fan_out
        self._objective, self._graph, self._world = config.objective, graph, world
        self._whole: Block | None = None
        if self._layers and not is_sampled(config, graph.users + graph.items):
            none = np.empty(0, np.int64)
            self._whole = full_block(graph, none, none).to(world.device)

    def block(self, users: Ids, items: Ids, key: tuple[int, int, int]) -> Block:
        """What :meth:`encode` needs for some users and items, on the host; ``key`` is (seed,
        epoch, step). Reads no parameter, so that it can be made ahead.

        Raises:
            UserError: an id is out of range.
        """
        for table, ids in (("user", users), ("item", items)):
            self.tables.refuse_out_of_range(table, ids)
        if self._whole is not None:
            position = full_position(self._graph, users, items)
            return replace(self._whole, position=position)
        return sampled_block(self._graph, users, items, self._fan_out[: self._layers], key)

    def encode(
        self, block: Block, gate: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encoder outputs of the users and items asked for, users first [both, D], and the half
        squared norms [both] of the table rows beneath them (what L2 regularises).

        One table lookup: each row once, however often its id occurs. :meth:`scored` makes the
        outputs what the objective sees. ``gate`` may change the gradient [N, D] of the rows, before
        backward updates the tables with it.
        """
        block = block.to(self._world.device)
        ego_ND = self.tables.lookup(block.users, block.items)
        if gate is not None and ego_ND.requires_grad:
            ego_ND.register_hook(gate)
        h_TD = propagate(block, ego_ND, self._layers)
        asked_TD = ego_ND if block.targets is None else ego_ND.index_select(0, block.targets)
        half_square = losses.l2(asked_TD).index_select(0, block.position)
        return h_TD.index_select(0, block.position), half_square

    def scored(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors whose dot product is the score: similarity over temperature."""
        if self._objective.similarity == "cosine":
            user, item = functional.normalize(user), functional.normalize(item)
        return user / self._objective.temperature, item

    @torch.no_grad()
    def encode_all(self) -> tuple[Tensor, Tensor]:
        """This rank's own users and items, [R, D] each, propagated exactly, as the objective
        sees them: their dot product is the score. On the host. Collective."""
        self._world.release_freed_blocks()
        own = propagate_own(self.tables, self._graph, self._layers, self._world)
        if self._objective.similarity == "cosine":
            for rows_RD in own:  # in place: there may be no room for them twice
                functional.normalize(rows_RD, out=rows_RD)
        own[0].div_(self._objective.temperature)
        return own


def is_sampled(config: Config, nodes: int) -> bool:
    """Whether training samples neighbours, or propagates over the whole graph at every step."""
    kind = config.model.propagation
    return kind == "sampled" or (kind == "auto" and nodes > AUTO_NODES)
