"""Top-K lists through an inverted index of faiss: most of the best items without scoring all.

Each rank indexes the items that it owns: k-means cells, of which a search visits the few whose
centres score best with the user. How many is found by trying, on some users, until the lists have
the wanted share of the exact ones.

Shapes: E users of everybody's chunks, R own items, D embedding dim, K list length.
"""

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.top_k import MASKED, ExactSearch, Ids

_POINTS = 64  # items per cell that k-means sees
_DEARER = 8  # an item of a visited cell, than one of a matrix product (docs/benchmarks.md)
_MASKED_PER_K = 8  # items at most of a user who is worth an index: it finds as many more than K


def recall_sums(found_EK: Ids, exact_EK: Ids) -> tuple[int, int]:
    """How many of the exact lists' items, -1 where there is none, the others have, and of how
    many."""
    hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(exact_EK, found_EK, strict=True)]
    return sum(hits), int((exact_EK >= 0).sum())


class ApproximateSearch:
    """A :data:`Search` like the exact one, whose items it indexes; :meth:`tune` it first.

    Holds the rank's vectors once more, on the host. Users whose lists an index would not fill, or
    not cheaply, since they mask much of what it finds, get exact ones.
    """

    def __init__(self, exact: ExactSearch, wanted: float) -> None:
        self._exact, self._wanted = exact, wanted
        self._index = _indexed(exact.item_RD.float().cpu().numpy())
        self.scores_all = False

    def tune(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        """Visit as many more cells as these users need; if that is no cheaper than to score every
        item, do that from now on. A :data:`Search` itself: of their lists."""
        light = np.flatnonzero(self._light(users, self._masked(users)))
        self.scores_all = 2 * len(light) < int((users >= 0).sum())
        vectors, some = user_ED[torch.from_numpy(light)], users[light]
        exact_EK = _listed(*self._exact(vectors, some))
        while not self.scores_all:
            hits, of = recall_sums(_listed(*self._visit(vectors, some)), exact_EK)
            if hits >= self._wanted * of:
                break
            self._index.nprobe *= 2
            self.scores_all = self._index.nprobe * _DEARER > self._index.nlist
        return self(user_ED, users)

    def __call__(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        if self.scores_all:
            return self._exact(user_ED, users)
        score_EK = user_ED.new_full((len(users), self._exact.k), -torch.inf)
        item_EK = torch.zeros_like(score_EK, dtype=torch.int64)
        masked = self._masked(users)
        light = np.flatnonzero(self._light(users, masked))
        place = torch.from_numpy(light)
        score_EK[place], item_EK[place] = self._visit(user_ED[place], users[light])
        there = np.minimum(self._exact.k, len(self._exact.own) - masked)
        short = np.flatnonzero((users >= 0) & ((score_EK > MASKED).sum(1).cpu().numpy() < there))
        if len(short):
            place = torch.from_numpy(short)
            score_EK[place], item_EK[place] = self._exact(user_ED[place], users[short])
        return score_EK, item_EK

    def _masked(self, users: Ids) -> Ids:
        """How many of this rank's items each user masks."""
        return np.bincount(self._exact.masked(users)[0], minlength=len(users))

    def _light(self, users: Ids, masked: Ids) -> npt.NDArray[np.bool_]:
        return (users >= 0) & (masked <= _MASKED_PER_K * self._exact.k)

    def _visit(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        """What the index finds for users who mask little: perhaps fewer than K items."""
        k, own = self._exact.k, self._exact.own
        row, item = self._exact.masked(users)
        most = np.bincount(row, minlength=1).max()
        width = min(k + int(most), len(own))
        score_EK = np.full((len(users), k), -np.inf, np.float32)
        item_EK = np.zeros((len(users), k), np.int64)
        if len(users) and width:
            scores, items = self._index.search(user_ED.float().cpu().numpy(), width)
            place = np.arange(len(users))[:, None] * len(own) + items
            none = (items < 0) | np.isin(place, row * len(own) + item)
            scores[none] = -np.inf
            best = np.argsort(none, axis=1, kind="stable")[:, :k]  # they are sorted already
            score_EK[:, : best.shape[1]] = np.take_along_axis(scores, best, 1)
            item_EK[:, : best.shape[1]] = np.take_along_axis(items, best, 1) + own.start
        device = user_ED.device
        return torch.from_numpy(score_EK).to(device), torch.from_numpy(item_EK).to(device)


def _listed(score_EK: Tensor, item_EK: Tensor) -> Ids:
    return item_EK.masked_fill(score_EK <= MASKED, -1).cpu().numpy()


def import_faiss() -> Any:
    """
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


def _indexed(vector_RD: npt.NDArray[np.float32]) -> Any:
    faiss, (rows, dim) = import_faiss(), vector_RD.shape
    faiss.omp_set_num_threads(torch.get_num_threads())
    cells = max(min(4 * math.isqrt(rows), rows // _POINTS), 1)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _POINTS
    if rows:
        index.train(vector_RD)
        index.add(vector_RD)
    return index
