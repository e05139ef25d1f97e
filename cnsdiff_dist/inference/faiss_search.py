"""Approximate top-K lists with an inverted index of faiss, which does not score every item.

Each rank indexes the items that it owns in k-means cells. A search visits only the cells whose
centres score best with the user. :meth:`ApproximateSearch.tune` chooses how many: it tries some
users and visits more cells until the lists hold the wanted share of the exact lists' items.

Shapes: A users of all ranks in one round, R items that this rank owns, D embedding dimension, K
list length.
"""

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.top_k import MASKED_SCORE, ExactSearch, Ids

# On average a cell holds at least this many items, and k-means sees at most as many per cell.
_ITEMS_PER_CELL = 64
# What an item of a visited cell costs relative to one of a matrix product (docs/benchmarks.md).
_COST_OF_VISITED_ITEM = 8
# A user who masks more than this many items per item of a list gets an exact list, because an index
# must find the masked items besides the K best.
_MASKED_PER_K = 8


def recall_sums(found_AK: Ids, exact_AK: Ids) -> tuple[int, int]:
    """Count the items of the exact lists that the other lists hold, and all items of the exact
    lists. -1 stands for no item."""
    pairs = zip(exact_AK, found_AK, strict=True)
    hits = [len(np.intersect1d(exact[exact >= 0], found)) for exact, found in pairs]
    return sum(hits), int((exact_AK >= 0).sum())


class ApproximateSearch:
    """A :data:`Search` with an index of the items of an exact one. Tune it before use.

    The index holds the rank's vectors a second time, on the host. It serves users with few masked
    items. The others, and users whose lists it does not fill, get exact lists.

    Args:
        wanted: the share of the exact lists' items to find.

    Attributes:
        scores_all: True where the index does not pay, so that every item is scored.
    """

    def __init__(self, exact: ExactSearch, wanted: float) -> None:
        self._exact, self._wanted = exact, wanted
        self._index = _build_index(exact.item_RD.float().cpu().numpy())
        self.scores_all = False

    def tune(self, user_AD: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        """Visit as many cells as these users need, and return their lists, as a :data:`Search`.

        If that is no cheaper than to score every item, every item is scored from now on.
        """
        served = np.flatnonzero(self._is_served(users, self._masked_counts(users)))
        self.scores_all = 2 * len(served) < int((users >= 0).sum())
        vectors, some = user_AD[torch.from_numpy(served)], users[served]
        exact_AK = _listed_items(*self._exact(vectors, some))
        while not self.scores_all:
            found_AK = _listed_items(*self._search_index(vectors, some))
            hits, total = recall_sums(found_AK, exact_AK)
            if hits >= self._wanted * total:
                break
            self._index.nprobe *= 2
            self.scores_all = self._index.nprobe * _COST_OF_VISITED_ITEM > self._index.nlist
        return self(user_AD, users)

    def __call__(self, user_AD: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        if self.scores_all:
            return self._exact(user_AD, users)
        score_AK = user_AD.new_full((len(users), self._exact.k), -torch.inf)
        item_AK = torch.zeros_like(score_AK, dtype=torch.int64)
        masked = self._masked_counts(users)
        served = np.flatnonzero(self._is_served(users, masked))
        place = torch.from_numpy(served)
        score_AK[place], item_AK[place] = self._search_index(user_AD[place], users[served])
        full = np.minimum(self._exact.k, len(self._exact.own) - masked)
        listed = (score_AK > MASKED_SCORE).sum(1).cpu().numpy()
        short = np.flatnonzero((users >= 0) & (listed < full))
        if len(short):
            place = torch.from_numpy(short)
            score_AK[place], item_AK[place] = self._exact(user_AD[place], users[short])
        return score_AK, item_AK

    def _masked_counts(self, users: Ids) -> Ids:
        """Count the items of this rank that each user masks, [A]."""
        return np.bincount(self._exact.masked_pairs(users)[0], minlength=len(users))

    def _is_served(self, users: Ids, masked: Ids) -> npt.NDArray[np.bool_]:
        """Whether the index serves each user, who masks ``masked`` items, bool [A]."""
        return (users >= 0) & (masked <= _MASKED_PER_K * self._exact.k)

    def _search_index(self, user_AD: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        """Search the index for users whom it serves. Their lists may have fewer than K items."""
        k, own = self._exact.k, self._exact.own
        row, item = self._exact.masked_pairs(users)
        most_masked = np.bincount(row, minlength=1).max()
        width = min(k + int(most_masked), len(own))
        score_AK = np.full((len(users), k), -np.inf, np.float32)
        item_AK = np.zeros((len(users), k), np.int64)
        if len(users) and width:
            scores, items = self._index.search(user_AD.float().cpu().numpy(), width)
            pair = np.arange(len(users))[:, None] * len(own) + items
            left_out = (items < 0) | np.isin(pair, row * len(own) + item)
            scores[left_out] = -np.inf
            # The index returns the best first, and a stable sort keeps that order.
            best = np.argsort(left_out, axis=1, kind="stable")[:, :k]
            score_AK[:, : best.shape[1]] = np.take_along_axis(scores, best, 1)
            item_AK[:, : best.shape[1]] = np.take_along_axis(items, best, 1) + own.start
        device = user_AD.device
        return torch.from_numpy(score_AK).to(device), torch.from_numpy(item_AK).to(device)


def _listed_items(score_AK: Tensor, item_AK: Tensor) -> Ids:
    """Return the items of the lists, -1 where a list has no more."""
    return item_AK.masked_fill(score_AK <= MASKED_SCORE, -1).cpu().numpy()


def import_faiss() -> Any:
    """Import faiss, which is an optional dependency.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError:
        raise UserError(
            "--approximate needs faiss, which is not installed; run `pip install faiss-cpu`"
        ) from None
    return faiss


def _build_index(vector_RD: npt.NDArray[np.float32]) -> Any:
    faiss, (rows, dim) = import_faiss(), vector_RD.shape
    faiss.omp_set_num_threads(torch.get_num_threads())
    cells = max(min(4 * math.isqrt(rows), rows // _ITEMS_PER_CELL), 1)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _ITEMS_PER_CELL
    if rows:
        index.train(vector_RD)
        index.add(vector_RD)
    return index
