"""Ranking metrics as sums that add up over rounds of users and over ranks.

Recall@K is the share of a user's relevant items in the list, Precision@K the share of the list
that is relevant, Hit@K whether any is, and NDCG@K the sum of 1 / log2(1 + rank) over the relevant
items of the list, divided by its largest possible value.

Shapes: A users of all ranks in one round, B this rank's users in a round, R items whose
recommendations this rank counts, K the longest list asked for, E environments.
"""

import numpy as np
import numpy.typing as npt

METRICS = ("recall", "ndcg", "hit", "precision")

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class RankingSums:
    """Collects the sums from which every metric of a split follows.

    Args:
        ks: the list lengths K.
        environments: E.
        degree_R: the train degrees of the items whose recommendations are counted here.
    """

    def __init__(self, ks: tuple[int, ...], environments: int, degree_R: Ids) -> None:
        self.ks, self._degree_R = ks, degree_R
        # Slot 0 is all items together, slot 1 + e is environment e.
        self.users = np.zeros(1 + environments)
        self.sums = np.zeros((1 + environments, len(ks), len(METRICS)))
        self._recommended = np.zeros((len(ks), len(degree_R)), np.int64)
        # Per K: distinct recommended items, recommendations, and the sum of their degrees.
        self.shown = np.zeros((len(ks), 3))
        # One entry per round: [users, ks, METRICS].
        self._user_values: list[Floats] = []

    def add_recommendations(self, item_AK: Ids) -> None:
        """Count recommendations of the items 0..R-1; other numbers are items of other ranks."""
        inside = (item_AK >= 0) & (item_AK < len(self._degree_R))
        for index, k in enumerate(self.ks):
            found = item_AK[:, :k][inside[:, :k]]
            self._recommended[index] += np.bincount(found, minlength=len(self._degree_R))

    def add_users(
        self, item_BK: Ids, relevant_row: Ids, relevant_item: Ids, environment: Ids, items: int
    ) -> None:
        """Add the metrics of those users who have at least one relevant item.

        Args:
            item_BK: recommended items, best first, K >= max(ks) or all items.
            relevant_row: the position in 0..B-1 of each relevant pair, ascending.
            relevant_item: its item, ascending within a row.
            environment: its item's environment.
            items: the number of items of the catalogue.
        """
        keys = relevant_row * items + relevant_item
        listed_keys = np.arange(len(item_BK))[:, None] * items + item_BK
        place_BK = np.minimum(np.searchsorted(keys, listed_keys), max(len(keys) - 1, 0))
        hit_BK = keys[place_BK] == listed_keys if len(keys) else np.zeros(item_BK.shape, bool)
        self._user_values.append(self._add_to_slot(0, hit_BK, relevant_row))
        for e in range(len(self.users) - 1):
            inside = environment == e
            hit_in_e = hit_BK & inside[place_BK] if len(keys) else hit_BK
            self._add_to_slot(1 + e, hit_in_e, relevant_row[inside])

    def _add_to_slot(self, slot: int, hit_BK: npt.NDArray[np.bool_], relevant_row: Ids) -> Floats:
        """Add the users with a relevant item, and return their values [users, ks, METRICS]."""
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

    def user_values(self) -> dict[str, Floats]:
        """Every metric of this rank's users, such as ``recall@20``, in the order they came."""
        values = np.concatenate([np.empty((0, *self.sums.shape[1:])), *self._user_values])
        return {
            f"{name}@{k}": values[:, index, column]
            for index, k in enumerate(self.ks)
            for column, name in enumerate(METRICS)
        }

    def to_vector(self) -> Floats:
        """All sums in one vector, to be summed over ranks that count different items."""
        count = self._recommended
        shown = np.stack([(count > 0).sum(1), count.sum(1), count @ self._degree_R], axis=1)
        return np.concatenate([self.users, self.sums.ravel(), shown.ravel().astype(np.float64)])

    def load_vector(self, vector: Floats) -> None:
        """Replace the sums by those of all ranks, laid out as in :meth:`to_vector`."""
        users, sums, shown = np.split(vector, np.cumsum([self.users.size, self.sums.size]))
        self.users, self.sums = users, sums.reshape(self.sums.shape)
        self.shown = shown.reshape(self.shown.shape)

    def result(self, items: int) -> dict[str, float]:
        """Means over users, after :meth:`load_vector`.

        ``coverage@20`` is the share of the catalogue's ``items`` that is recommended to anyone,
        ``popularity@20`` the mean train degree of a recommendation.
        """
        out = self._means(0)
        for k, (distinct, count, degrees) in zip(self.ks, self.shown.tolist(), strict=True):
            out[f"coverage@{k}"] = distinct / items
            out[f"popularity@{k}"] = degrees / max(count, 1)
        return out

    def by_environment(self) -> list[dict[str, float]]:
        """Per environment, the metrics when only its items are relevant, and its user count."""
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
