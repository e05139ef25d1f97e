"""Ranking metrics, vectorised over users, and their sums over chunks and ranks.

Shapes: B users of a chunk, I items, K the longest list asked for, E environments.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

METRICS = ("recall", "ndcg", "hit", "precision")


def top_k(score_BI: Tensor, k: int, group: int = 64) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, best first: (scores, columns) [B, min(k, I)].

    Exact: the k best groups of columns by their maximum hold the k best columns, so the
    costly selection sees k groups instead of a whole row, and then eighths of those.
    """
    rows, columns = score_BI.shape
    k = min(k, columns)
    groups = -(-columns // group)
    if group < 8 or groups <= 2 * k:
        best = torch.topk(score_BI, k, dim=1)
        return best.values, best.indices
    body = columns // group * group
    maximum = score_BI[:, :body].view(rows, -1, group).amax(2)
    if body < columns:
        maximum = torch.cat([maximum, score_BI[:, body:].amax(1, keepdim=True)], 1)
    chosen = torch.topk(maximum, k, dim=1, sorted=False).indices
    inside = torch.arange(group, device=score_BI.device)
    column = (chosen[:, :, None] * group + inside).view(rows, -1)
    candidate = score_BI.gather(1, column.clamp(max=columns - 1))
    if body < columns:
        candidate.masked_fill_(column >= columns, -torch.inf)
    values, place = top_k(candidate, k, group // 8)
    return values, column.gather(1, place)


class RankingSums:
    """Sums from which every metric of a split follows; additive over users and ranks.

    Args:
        ks: the list lengths K.
        environments: E.
        own_degree: int64, the train degrees of the items whose recommendations are counted here.
    """

    def __init__(
        self, ks: tuple[int, ...], environments: int, own_degree: npt.NDArray[np.int64]
    ) -> None:
        self.ks, self._degree = ks, own_degree
        # Slot 0 is all items together, slot 1 + e is environment e.
        self.users = np.zeros(1 + environments)
        self.sums = np.zeros((1 + environments, len(ks), len(METRICS)))
        self._recommended = np.zeros((len(ks), len(own_degree)), np.int64)
        # Per K: items recommended to anyone, recommendations, and the sum of their degrees.
        self.shown = np.zeros((len(ks), 3))
        # This rank's users, a chunk at a time: [users, ks, METRICS].
        self.per_user: list[npt.NDArray[np.float64]] = []

    def recommend(self, own_BK: npt.NDArray[np.int64]) -> None:
        """Count what is recommended of the items at 0..len(own_degree) - 1; others are not."""
        inside = (own_BK >= 0) & (own_BK < len(self._degree))
        for index, k in enumerate(self.ks):
            found = own_BK[:, :k][inside[:, :k]]
            self._recommended[index] += np.bincount(found, minlength=len(self._degree))

    def add(
        self,
        ranked_BK: npt.NDArray[np.int64],
        relevant_row: npt.NDArray[np.int64],
        relevant_item: npt.NDArray[np.int64],
        environment: npt.NDArray[np.int64],
        items: int,
    ) -> None:
        """Count users who have at least one relevant item.

        Args:
            ranked_BK: recommended items, best first, K >= max(ks) or all items.
            relevant_row: position in 0..B-1 of each relevant pair, ascending.
            relevant_item: its item, ascending within a row.
            environment: its item's environment.
            items: of the catalogue.
        """
        users = len(ranked_BK)
        keys = relevant_row * items + relevant_item
        ranked_keys = np.arange(users)[:, None] * items + ranked_BK
        place_BK = np.minimum(np.searchsorted(keys, ranked_keys), max(len(keys) - 1, 0))
        hit_BK = keys[place_BK] == ranked_keys if len(keys) else np.zeros(ranked_BK.shape, bool)
        self.per_user.append(self._add_slot(0, hit_BK, relevant_row))
        for e in range(len(self.users) - 1):
            inside = environment == e
            hit_in_e = hit_BK & inside[place_BK] if len(keys) else hit_BK
            self._add_slot(1 + e, hit_in_e, relevant_row[inside])

    def _add_slot(
        self, slot: int, hit_BK: npt.NDArray[np.bool_], relevant_row: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """Add the users that have something relevant; their values [users, ks, METRICS]."""
        relevant_B = np.bincount(relevant_row, minlength=len(hit_BK))
        has = relevant_B > 0
        hit, relevant = hit_BK[has], relevant_B[has]
        self.users[slot] += has.sum()
        discount = 1 / np.log2(np.arange(2, max(self.ks) + 2))
        ideal = np.concatenate([[0.0], np.cumsum(discount)])
        values = np.empty((len(hit), len(self.ks), len(METRICS)))
        for index, k in enumerate(self.ks):
            found = hit[:, :k].sum(1)
            gain = hit[:, :k] @ discount[: min(k, hit.shape[1])]
            ndcg = gain / ideal[np.minimum(relevant, k)]
            values[:, index] = np.stack([found / relevant, ndcg, found > 0, found / k], axis=1)
        self.sums[slot] += values.sum(0)
        return values

    def to_vector(self) -> npt.NDArray[np.float64]:
        """Everything in one vector, to be summed over ranks that count different items."""
        count = self._recommended
        shown = np.stack([(count > 0).sum(1), count.sum(1), count @ self._degree], axis=1)
        return np.concatenate([self.users, self.sums.ravel(), shown.ravel().astype(np.float64)])

    def load(self, values: npt.NDArray[np.float64]) -> None:
        """Take the sums over ranks back from :meth:`to_vector`'s layout."""
        cuts = np.cumsum([self.users.size, self.sums.size])
        users, sums, shown = np.split(values, cuts)
        self.users, self.sums = users, sums.reshape(self.sums.shape)
        self.shown = shown.reshape(self.shown.shape)

    def result(self, items: int) -> dict[str, float]:
        """Means over users: ``recall@20``, ``coverage@20`` (share of the catalogue of so many
        items that is recommended to anyone), ``popularity@20`` (mean train degree of what is
        recommended). After :meth:`load`.
        """
        out = self._means(0)
        for k, (distinct, count, degrees) in zip(self.ks, self.shown.tolist(), strict=True):
            out[f"coverage@{k}"] = distinct / items
            out[f"popularity@{k}"] = degrees / max(count, 1)
        return out

    def by_environment(self) -> list[dict[str, float]]:
        """The metrics where only an environment's items are relevant, with its user count."""
        return [
            {"users": int(self.users[1 + e]), **self._means(1 + e)}
            for e in range(len(self.users) - 1)
        ]

    def _means(self, slot: int) -> dict[str, float]:
        mean = self.sums[slot] / max(self.users[slot], 1)
        return {
            f"{name}@{k}": float(mean[index, column])
            for index, k in enumerate(self.ks)
            for column, name in enumerate(METRICS)
        }
