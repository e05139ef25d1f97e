"""Full ranking of every item for every user of a split, users sharded over ranks.

Shapes: B users of a chunk, U users, I items, D embedding dim, K list length.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.config import Evaluation
from cnsdiff_dist.data.dataset import read_split
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.metrics import METRICS, Interactions, RankingSums, top_k
from cnsdiff_dist.world import World

Ids = npt.NDArray[np.int64]


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
        self._degree = np.diff(graph.item_indptr).astype(np.int64)
        users = np.flatnonzero(np.diff(self._relevant.indptr))
        if not len(users):
            raise UserError(f"split {split} is empty; choose another with --split")
        self._users = np.array_split(users, world.size)[world.rank]

    def __call__(self, user_UD: Tensor, item_ID: Tensor) -> dict[str, Any]:
        """Metrics of the split, the same on every rank. Collective.

        Returns:
            ``users``, ``masked``, ``metrics`` and one entry per environment, least popular
            first, in ``environments``.
        """
        return self.detailed(user_UD, item_ID)[0]

    def detailed(
        self, user_UD: Tensor, item_ID: Tensor
    ) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """The same, and of this rank's users the columns ``user`` (row) and every metric."""
        environment = self._manifest.environment_of(self._degree)
        count = self._manifest.environments
        sums = RankingSums(self._config.k, count, environment, self._degree)
        ranked = rank(
            user_UD, item_ID, self._users, self._masks, max(self._config.k),
            self._config.users_per_chunk,
        )  # fmt: skip
        for users, _, items in ranked:
            sums.add(items, *self._relevant.of(users))
        values = np.concatenate([np.empty((0, len(sums.ks), len(METRICS))), *sums.per_user])
        columns: dict[str, npt.NDArray[Any]] = {"user": self._users}
        for index, k in enumerate(sums.ks):
            columns |= {f"{name}@{k}": values[:, index, m] for m, name in enumerate(METRICS)}
        sums.load(self._world.sum(sums.to_tensor().to(user_UD.device)))
        edges = [0, *self._manifest.environment_edges, None]
        result = {
            "split": self.split,
            "masked": self.masked,
            "users": int(sums.users[0]),
            "metrics": sums.result(),
            "environments": [
                {
                    "environment": e,
                    "train_degree": [edges[e], edges[e + 1]],
                    "items": int((environment == e).sum()),
                    **entry,
                }
                for e, entry in enumerate(sums.by_environment())
            ],
        }
        return result, columns


def masked_splits(manifest: Manifest, split: str) -> list[str]:
    """Train, and for a test split the validation splits there are."""
    validation = ["valid_iid", "valid_ood"] if split.startswith("test") else []
    return ["train", *(name for name in validation if name in manifest.splits)]


def train_interactions(graph: GraphArrays) -> Interactions:
    return Interactions(graph.user_indptr, graph.user_items)


@torch.no_grad()
def rank(
    user_UD: Tensor, item_ID: Tensor, users: Ids, masks: list[Interactions], k: int, chunk: int
) -> Iterator[tuple[Ids, npt.NDArray[np.float32], Ids]]:
    """Chunks of (users [B], scores [B, K], items [B, K]), best first.

    Masked items score -inf; they appear only where a user has fewer than K others.
    """
    columns = item_ID.t()
    for start in range(0, len(users), chunk):
        some = users[start : start + chunk]
        score_BI = user_UD[torch.from_numpy(some).to(user_UD.device)] @ columns
        for mask in masks:
            row, item = (torch.from_numpy(part).to(score_BI.device) for part in mask.of(some))
            score_BI[row, item] = -torch.inf
        score_BK, item_BK = top_k(score_BI, k)
        yield some, score_BK.cpu().numpy(), item_BK.cpu().numpy()
