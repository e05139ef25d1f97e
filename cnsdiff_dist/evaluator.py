"""Full ranking of every item for every user of a split, items sharded over ranks.

Each rank scores its own items for everybody's users, and the ranks' lists are merged: no rank
holds the catalogue. Users are those that the rank owns, as in :meth:`World.own`.

Shapes: B users of a chunk, E of everybody's chunks, R own rows, C own items at a time, D
embedding dim, K list length.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
ITEMS = 16_384  # scored at a time
MASKED = torch.finfo(torch.float32).min


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


def owned(users: Ids, of: int, world: World) -> Ids:
    """Those of some users (ascending) that this rank owns, of so many rows."""
    own = world.own(of)
    return users[np.searchsorted(users, own.start) : np.searchsorted(users, own.stop)]


def masked_splits(manifest: Manifest, split: str) -> list[str]:
    """Train, and for a test split the validation splits there are."""
    validation = ["valid_iid", "valid_ood"] if split.startswith("test") else []
    return ["train", *(name for name in validation if name in manifest.splits)]


def train_interactions(graph: GraphArrays) -> Interactions:
    return Interactions(graph.user_indptr, graph.user_items)


@dataclass(frozen=True)
class Ranked:
    """Lists of this rank's ``users`` [B], best first: ``scores`` and ``items`` [B, K];
    ``everyones`` are the items of all ranks' lists of this round, [E, K]."""

    users: Ids
    scores: npt.NDArray[np.float32]
    items: Ids
    everyones: Ids


Search = Callable[[Tensor, Ids], tuple[Tensor, Tensor]]
"""Everybody's vectors [E, D] and their users, -1 where there is none, to the K best of this rank's
items for each, best first: scores and items [E, K]. What is no recommendation scores at most
``MASKED``."""


@torch.no_grad()
def rank(
    user_RD: Tensor, users: Ids, search: Search, chunk: int, of: int, world: World
) -> Iterator[Ranked]:
    """The best items of all ranks for some of the users that this rank owns of ``of`` users, up to
    ``chunk`` at a time. Collective: every rank iterates to the end.

    What ``search`` has masked scores -inf; it appears only where a user has fewer than K others.
    """
    device, first = world.device, world.own(of).start
    counts = world.gather(torch.tensor([len(users)], device=device))[:, 0].tolist()
    for start in range(0, max(counts), chunk):
        size = min(chunk, max(counts) - start)
        some = users[start : start + size]
        row_B1 = torch.full((size, 1), -1, device=device)
        row_B1[: len(some), 0] = torch.from_numpy(some)
        vector_BD = user_RD.new_zeros(size, user_RD.shape[1], device=device)
        vector_BD[: len(some)] = user_RD[torch.from_numpy(some - first)].to(device)
        everyone = world.gather(row_B1).flatten().cpu().numpy()
        vector_ED = world.gather(vector_BD).flatten(0, 1)
        score_EK, item_EK = _merged(*search(vector_ED, everyone), world)
        mine = slice(world.rank * size, world.rank * size + len(some))
        lists = item_EK.cpu().numpy()
        yield Ranked(some, score_EK[mine].cpu().numpy(), lists[mine], lists[everyone >= 0])


@dataclass(frozen=True)
class ExactSearch:
    """Scores every item that this rank owns (``own``, with vectors ``item_RD`` and what is added to
    their scores), piece by piece. What ``masks`` have of the first ``masking`` users is masked."""

    item_RD: Tensor
    own: range
    masks: list[Interactions]
    k: int
    offset_R: Tensor | None = None
    masking: int = sys.maxsize

    def __call__(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        row, item = self.masked(users)
        order = np.argsort(item)
        row, item = row[order], item[order]
        # Filled up with -inf; a masked item scores more than that, so that it is never lost to it.
        best_EK = user_ED.new_full((len(user_ED), self.k), -torch.inf)
        item_EK = torch.zeros_like(best_EK, dtype=torch.int64)
        room_EC = user_ED.new_empty(
            len(user_ED) * ITEMS
        )  # fresh memory costs more than the product
        for start in range(0, len(self.own), ITEMS):
            score_EC = self._scores(user_ED, start, room_EC)
            here = slice(*np.searchsorted(item, [start, start + score_EC.shape[1]]))
            at = (torch.from_numpy(part[here]).to(user_ED.device) for part in (row, item - start))
            score_EC[tuple(at)] = MASKED
            piece_EK, column_EK = top_k(score_EC, self.k)
            items = torch.cat([item_EK, column_EK + (self.own.start + start)], 1)
            best_EK, place_EK = torch.topk(torch.cat([best_EK, piece_EK], 1), self.k, dim=1)
            item_EK = items.gather(1, place_EK)
        return best_EK, item_EK

    def _scores(self, user_ED: Tensor, start: int, room_EC: Tensor) -> Tensor:
        piece_DC = self.item_RD[start : start + ITEMS].to(user_ED.device).t()
        score_EC = room_EC[: len(user_ED) * piece_DC.shape[1]].view(len(user_ED), -1)
        if self.offset_R is None:
            return torch.mm(user_ED, piece_DC, out=score_EC)
        offset_C = self.offset_R[start : start + ITEMS].to(user_ED.device)
        return torch.addmm(offset_C, user_ED, piece_DC, out=score_EC)

    def masked(self, users: Ids) -> tuple[Ids, Ids]:
        """The masked pairs among this rank's items: positions in ``users``, and items counted
        from the first own one."""
        real = np.flatnonzero((users >= 0) & (users < self.masking))
        pairs = [mask.of(users[real]) for mask in self.masks]
        row, item = (np.concatenate(side) for side in zip(*pairs, strict=True))
        mine = (item >= self.own.start) & (item < self.own.stop)
        return real[row[mine]], item[mine] - self.own.start


def _merged(score_EK: Tensor, item_EK: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """The K best of all ranks' lists."""
    scores, items = (world.gather(part).transpose(0, 1).flatten(1) for part in (score_EK, item_EK))
    best_EK, place_EK = torch.topk(scores, score_EK.shape[1], dim=1)
    return best_EK.masked_fill(best_EK <= MASKED, -torch.inf), items.gather(1, place_EK)
