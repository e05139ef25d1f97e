"""The model a run trains: sharded tables under a LightGCN encoder.

Shapes: B rows, D embedding dim, U users, I items, N nodes of a block (users first).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist import losses
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.models.lightgcn import Block, full_block, propagate
from cnsdiff_dist.parallel.sparse import ShardedTables
from cnsdiff_dist.world import World

Ids = npt.NDArray[np.int64]


class Recommender:
    def __init__(
        self, config: Config, manifest: Manifest, graph: GraphArrays, world: World
    ) -> None:
        self.tables = ShardedTables(
            manifest.users, manifest.items, config.model.dim, config.tables, config.run.seed, world
        )
        self._layers, self._device = config.model.layers, world.device
        self._objective = config.objective
        self._shape = (manifest.users, manifest.items)
        self._whole = full_block(graph, self._layers, world.device) if self._layers else None

    def encode(self, users: Ids, items: Ids) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder outputs of users [len(users), D] and items [len(items), D] as the objective
        sees them, and the half squared norms [both] of the table rows beneath them (what L2
        regularises).

        One table lookup: each row once, however often its id occurs.

        Raises:
            UserError: an id is out of range.
        """
        for table, ids in (("user", users), ("item", items)):
            self.tables.refuse_out_of_range(table, ids)
        block, position = self._block(users, items)
        ego_ND = self.tables.lookup(block.users, block.items)
        h_ND = propagate(block, ego_ND, self._layers)
        user_BD, item_BD = h_ND.index_select(0, position).split([len(users), len(items)])
        half_square = losses.l2(ego_ND).index_select(0, position)
        return *self._scored(user_BD, item_BD), half_square

    def _scored(self, user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors whose dot product is the score: similarity over temperature."""
        if self._objective.similarity == "cosine":
            user, item = functional.normalize(user), functional.normalize(item)
        return user / self._objective.temperature, item

    def _block(self, users: Ids, items: Ids) -> tuple[Block, Tensor]:
        """The block a batch needs and the rows' places in it."""
        if self._whole is not None:
            position = np.concatenate([users, items + self._shape[0]])
            return self._whole, torch.from_numpy(position).to(self._device)
        own = [np.unique(ids, return_inverse=True) for ids in (users, items)]
        nodes = [torch.from_numpy(ids).to(self._device) for ids, _ in own]
        position = np.concatenate([own[0][1], own[1][1] + len(own[0][0])])
        return Block(nodes[0], nodes[1], None), torch.from_numpy(position).to(self._device)

    @torch.no_grad()
    def encode_all(self) -> tuple[Tensor, Tensor]:
        """Every user's and item's vector, [U, D] and [I, D], as the objective sees them: their
        dot product is the score. Collective."""
        users, items = (torch.arange(rows, device=self._device) for rows in self._shape)
        block = self._whole or Block(users, items, None)
        h_ND = propagate(block, self.tables.lookup(block.users, block.items), self._layers)
        user_UD, item_ID = h_ND.split(list(self._shape))
        return self._scored(user_UD, item_ID)
