"""Pools: the batch's own positives as negatives of every row of their group.

Shapes: B rows, G groups of W rows. A group is the rows of one canonical stream in a step, so that
a row's pool depends neither on the world size nor on the rank.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.distributed.world import to_device
from cnsdiff_dist.samplers.protocol import EncodedBatch, Ids


class KnownPositives:
    """Tells which positives of a group a user of the group has interacted with.

    The work is in proportion to the train rows of the batch's distinct users. Nothing is kept
    that has the length of the catalogue.
    """

    def __init__(self, graph: GraphArrays) -> None:
        self._train = Interactions(graph.user_indptr, graph.user_items)

    def of(self, users: Ids, items: Ids, groups: int) -> npt.NDArray[np.bool_]:
        """Whether the user of row b has item w of b's group, bool [B, W]; both ids are [B]."""
        pairs = zip(np.split(users, groups), np.split(items, groups), strict=True)
        return np.concatenate([self._of_group(user, item) for user, item in pairs])

    def _of_group(self, users: Ids, items: Ids) -> npt.NDArray[np.bool_]:
        pool, column = np.unique(items, return_inverse=True)
        who, row = np.unique(users, return_inverse=True)
        owner, liked = self._train.of(who)
        place = np.searchsorted(pool, liked)
        in_pool = pool.take(place, mode="clip") == liked
        known = np.zeros((len(who), len(pool)), bool)
        known[owner[in_pool], place[in_pool]] = True
        return known[row].take(column, axis=1)


def batch_offsets(known: KnownPositives, encoded: EncodedBatch) -> Tensor:
    """0, or -inf where positive w of the group may not be a negative of row b, [B, W].

    It may not where it is a pad, or an item that b's user has interacted with, b's own positive
    included.
    """
    batch = encoded.batch
    out = known.of(batch.users, batch.items, encoded.groups)
    out |= np.repeat(batch.weight.reshape(encoded.groups, -1) == 0, out.shape[1], axis=0)
    return torch.where(to_device(torch.from_numpy(out), encoded.user_BD.device), -torch.inf, 0.0)
