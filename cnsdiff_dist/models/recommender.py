"""The model that a run trains: sharded tables under a LightGCN encoder.

Shapes: B ids asked for, V nodes of a block (users first), R table rows that this rank owns,
D embedding dimension.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist import sections
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
    """Encodes users and items; ``objective`` says how two encodings are scored."""

    def __init__(
        self,
        tables: ShardedTables,
        model: sections.Model,
        objective: sections.Objective,
        graph: GraphArrays,
        world: World,
    ) -> None:
        self.tables = tables
        self._layers, self._fan_out = model.layers, model.fan_out
        self._objective, self._graph, self._world = objective, graph, world
        self._whole: Block | None = None
        if self._layers and not is_sampled(model, graph.users + graph.items):
            none = np.empty(0, np.int64)
            self._whole = full_block(graph, none, none).to(world.device)

    def block(self, users: Ids, items: Ids, key: tuple[int, int, int]) -> Block:
        """The part of the graph that :meth:`encode` needs for some users and items, on the host.

        It reads no parameter, so that it can be made ahead of the step. ``key`` is (seed, epoch,
        step).

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
        """Encode the users and items that a block on the device was made for, users first.

        Each table row is looked up once, however often its id occurs. :meth:`scored` makes of the
        outputs what the objective sees.

        Args:
            gate: may change the gradient of the rows, [V, D], before backward updates the tables.

        Returns:
            The encoder's outputs [B, D], and the half squared norms [B] of the table rows beneath
            them, which L2 regularises.
        """
        ego_VD = self.tables.lookup(block.users, block.items)
        if gate is not None and ego_VD.requires_grad:
            ego_VD.register_hook(gate)
        h_QD = propagate(block, ego_VD, self._layers)
        asked_QD = ego_VD if block.targets is None else ego_VD.index_select(0, block.targets)
        half_square = losses.l2(asked_QD).index_select(0, block.position)
        return h_QD.index_select(0, block.position), half_square

    def scored(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors whose dot product is the score: the similarity over the temperature."""
        if self._objective.similarity == "cosine":
            user, item = functional.normalize(user), functional.normalize(item)
        return user / self._objective.temperature, item

    @torch.no_grad()
    def encode_all(self) -> tuple[Tensor, Tensor]:
        """The users and items that this rank owns, [R, D] each, on the host. Collective.

        They are propagated exactly, and scored as the objective does it: their dot product is the
        score.
        """
        self._world.release_freed_blocks()
        own = propagate_own(self.tables, self._graph, self._layers, self._world)
        if self._objective.similarity == "cosine":
            for rows_RD in own:  # in place: there may be no room for them twice
                functional.normalize(rows_RD, out=rows_RD)
        own[0].div_(self._objective.temperature)
        return own


def is_sampled(model: sections.Model, nodes: int) -> bool:
    """Whether a step samples neighbours, or propagates over the whole graph."""
    return model.propagation == "sampled" or (model.propagation == "auto" and nodes > AUTO_NODES)
