"""Metrics of a split: rank every item for each user of the split, and count.

Shapes: R rows that this rank owns, D embedding dimension, E environments.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.dataset import read_split
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.metrics import RankingSums
from cnsdiff_dist.evaluation.top_k import ExactSearch, top_k_lists, users_of_rank
from cnsdiff_dist.sections import Evaluation


class Evaluator:
    """Evaluates one split, which it reads once.

    Items that a user is already known to like are masked: train items and, on a test split, the
    validation items.

    Raises:
        UserError: the dataset has no such split, or it is empty.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        graph: GraphArrays,
        split: str,
        config: Evaluation,
        world: World,
    ) -> None:
        shape = (manifest.users, manifest.items)
        self.split, self._manifest, self._config, self._world = split, manifest, config, world
        self._relevant = Interactions.from_pairs(*read_split(url, manifest, split), shape)
        self.masked = masked_splits(manifest, split)
        self._masks = [train_interactions(graph)] + [
            Interactions.from_pairs(*read_split(url, manifest, name), shape)
            for name in self.masked[1:]
        ]
        users = np.flatnonzero(np.diff(self._relevant.indptr))
        if not len(users):
            raise UserError(f"split {split} is empty; choose another with --split")
        self._graph, self._users = graph, users_of_rank(users, manifest.users, world)

    def __call__(
        self, user_RD: Tensor, item_RD: Tensor, offset_R: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the metrics of the split, the same on every rank. Collective.

        Args:
            user_RD: vectors of the users that this rank owns.
            item_RD: vectors of the items that this rank owns.
            offset_R: added to the scores of these items.

        Returns:
            ``split``, ``masked``, ``users``, ``metrics`` and, in ``environments``, one entry per
            environment, least popular first.
        """
        return self.with_user_values(user_RD, item_RD, offset_R)[0]

    def with_user_values(
        self, user_RD: Tensor, item_RD: Tensor, offset_R: Tensor | None = None
    ) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return the metrics as :meth:`__call__` does, and a table of this rank's users with the
        columns ``user`` (table row) and every metric. Collective."""
        own = self._world.own_rows(self._manifest.items)
        degree_R = self._graph.item_degree(np.arange(own.start, own.stop))
        sums = RankingSums(self._config.k, self._manifest.environments, degree_R)
        self._rank_users(sums, user_RD, item_RD, offset_R)
        columns = {"user": self._users, **sums.user_values()}
        item_counts_E = self._sum_over_ranks(sums, degree_R)
        result = {
            "split": self.split,
            "masked": self.masked,
            "users": int(sums.users[0]),
            "metrics": sums.result(self._manifest.items),
            "environments": self._environments(sums, item_counts_E),
        }
        return result, columns

    def _rank_users(
        self, sums: RankingSums, user_RD: Tensor, item_RD: Tensor, offset_R: Tensor | None
    ) -> None:
        manifest, own = self._manifest, self._world.own_rows(self._manifest.items)
        k = min(max(self._config.k), manifest.items)
        search = ExactSearch(item_RD, own, self._masks, k, offset_R)
        chunk = self._config.users_per_chunk
        for lists in top_k_lists(user_RD, self._users, search, chunk, manifest.users, self._world):
            row, item = self._relevant.of(lists.users)
            environment = manifest.environment_of(self._graph.item_degree(item))
            sums.add_users(lists.items, row, item, environment, manifest.items)
            sums.add_recommendations(lists.items_of_all_ranks - own.start)

    def _sum_over_ranks(self, sums: RankingSums, degree_R: npt.NDArray[np.int64]) -> list[int]:
        """Load the sums of all ranks into ``sums``; return the number of items by environment."""
        environments = self._manifest.environments
        own_counts_E = np.bincount(self._manifest.environment_of(degree_R), minlength=environments)
        vector = torch.from_numpy(np.concatenate([sums.to_vector(), own_counts_E]))
        total = self._world.sum(vector.to(self._world.device)).cpu().numpy()
        sums.load_vector(total[:-environments])
        return [int(count) for count in total[-environments:]]

    def _environments(self, sums: RankingSums, item_counts_E: list[int]) -> list[dict[str, Any]]:
        edges = [0, *self._manifest.environment_edges, None]
        return [
            {
                "environment": e,
                "train_degree": [edges[e], edges[e + 1]],
                "items": item_counts_E[e],
                **means,
            }
            for e, means in enumerate(sums.by_environment())
        ]


def masked_splits(manifest: Manifest, split: str) -> list[str]:
    """The splits whose pairs are masked on ``split``: train, and validation on a test split."""
    validation = ["valid_iid", "valid_ood"] if split.startswith("test") else []
    return ["train", *(name for name in validation if name in manifest.splits)]


def train_interactions(graph: GraphArrays) -> Interactions:
    return Interactions(graph.user_indptr, graph.user_items)
