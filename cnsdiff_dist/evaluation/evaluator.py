"""Metrics of a split from the full ranking of every item for each of its users.

Shapes: R own rows of a rank, D embedding dim.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.config import Evaluation
from cnsdiff_dist.data.dataset import read_split
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.metrics import METRICS, RankingSums
from cnsdiff_dist.evaluation.top_k import ExactSearch, owned, rank


class Evaluator:
    """Evaluates one split; reads it once.

    What a user is already known to like is not recommended again: train items are masked,
    and for a test split the validation items too.

    Raises:
        UserError: the dataset has no such split, or it is empty.
    """

    def __init__(
        self, url: str, manifest: Manifest, graph: GraphArrays, split: str, config: Evaluation,
        world: World,
    ) -> None:  # fmt: skip
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
        self._graph, self._users = graph, owned(users, manifest.users, world)

    def __call__(
        self, user_RD: Tensor, item_RD: Tensor, offset_R: Tensor | None = None
    ) -> dict[str, Any]:
        """Metrics of the split, the same on every rank, by each rank's own vectors and what is
        added to the scores of its items. Collective.

        Returns:
            ``users``, ``masked``, ``metrics`` and one entry per environment, least popular
            first, in ``environments``.
        """
        return self.detailed(user_RD, item_RD, offset_R)[0]

    def detailed(
        self, user_RD: Tensor, item_RD: Tensor, offset_R: Tensor | None = None
    ) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """The same, and of this rank's users the columns ``user`` (row) and every metric."""
        manifest, own = self._manifest, self._world.own(self._manifest.items)
        own_degree = self._graph.item_degree(np.arange(own.start, own.stop))
        own_environment = manifest.environment_of(own_degree)
        sums = RankingSums(self._config.k, manifest.environments, own_degree)
        search = ExactSearch(
            item_RD, own, self._masks, min(max(self._config.k), manifest.items), offset_R
        )
        chunk = self._config.users_per_chunk
        for found in rank(user_RD, self._users, search, chunk, manifest.users, self._world):
            relevant_row, relevant_item = self._relevant.of(found.users)
            environment = manifest.environment_of(self._graph.item_degree(relevant_item))
            sums.add(found.items, relevant_row, relevant_item, environment, manifest.items)
            sums.recommend(found.everyones - own.start)
        values = np.concatenate([np.empty((0, len(sums.ks), len(METRICS))), *sums.per_user])
        columns: dict[str, npt.NDArray[Any]] = {"user": self._users}
        for index, k in enumerate(sums.ks):
            columns |= {f"{name}@{k}": values[:, index, m] for m, name in enumerate(METRICS)}
        counts = np.bincount(own_environment, minlength=manifest.environments)
        total = self._sum(np.concatenate([sums.to_vector(), counts]))
        sums.load(total[: -len(counts)])
        edges = [0, *manifest.environment_edges, None]
        result = {
            "split": self.split,
            "masked": self.masked,
            "users": int(sums.users[0]),
            "metrics": sums.result(manifest.items),
            "environments": [
                {
                    "environment": e,
                    "train_degree": [edges[e], edges[e + 1]],
                    "items": int(total[len(total) - len(counts) + e]),
                    **entry,
                }
                for e, entry in enumerate(sums.by_environment())
            ],
        }
        return result, columns

    def _sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        summed = self._world.sum(torch.from_numpy(values).to(self._world.device))
        out: npt.NDArray[np.float64] = summed.cpu().numpy()
        return out


def masked_splits(manifest: Manifest, split: str) -> list[str]:
    """Train, and for a test split the validation splits there are."""
    validation = ["valid_iid", "valid_ood"] if split.startswith("test") else []
    return ["train", *(name for name in validation if name in manifest.splits)]


def train_interactions(graph: GraphArrays) -> Interactions:
    return Interactions(graph.user_indptr, graph.user_items)
