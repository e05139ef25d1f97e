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
from cnsdiff_dist.evaluator import MASKED, ExactSearch, Ids

_POINTS = 64  # items per cell that k-means sees
_DEARER = 8  # an item of a visited cell, than one of a matrix product (docs/benchmarks.md)
_WIDER = 4  # in each round, for the users who have more masked items than it searches


def recall_sums(found_EK: Ids, exact_EK: Ids) -> tuple[int, int]:
    """How many of the exact lists' items, -1 where there is none, the others have, and of how
    many."""
    hits = [len(np.intersect1d(a[a >= 0], b)) for a, b in zip(exact_EK, found_EK, strict=True)]
    return sum(hits), int((exact_EK >= 0).sum())


class ApproximateSearch:
    """A :data:`Search` like the exact one, whose items it indexes; :meth:`tune` it first.

    Holds the rank's vectors once more, on the host.
    """

    def __init__(self, exact: ExactSearch, wanted: float) -> None:
        self._exact, self._wanted = exact, wanted
        self._index = _indexed(exact.item_RD.float().cpu().numpy())
        self._scores_all = False

    def tune(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        """Visit as many more cells as these users need; if that is no cheaper than to score every
        item, do that from now on. A :data:`Search` itself: of their lists."""
        exact_EK = _listed(*self._exact(user_ED, users))
        while not self._scores_all:
            found = self(user_ED, users)
            hits, of = recall_sums(_listed(*found), exact_EK)
            if hits >= self._wanted * of:
                return found
            self._index.nprobe *= 2
            self._scores_all = self._index.nprobe * _DEARER > self._index.nlist
        return self._exact(user_ED, users)

    def __call__(self, user_ED: Tensor, users: Ids) -> tuple[Tensor, Tensor]:
        if self._scores_all:
            return self._exact(user_ED, users)
        k, own = self._exact.k, self._exact.own
        vector_ED = user_ED.float().cpu().numpy()
        score_EK = np.full((len(users), k), -np.inf, np.float32)
        item_EK = np.zeros((len(users), k), np.int64)
        row, item = self._exact.masked(users)
        masked = np.bincount(row, minlength=len(users))
        pairs = row * len(own) + item
        left, width = np.flatnonzero(users >= 0), 2 * k
        while len(left) and len(own):
            some = left[masked[left] + k <= width] if width < len(own) else left
            scores, items = self._index.search(vector_ED[some], min(width, len(own)))
            none = (items < 0) | np.isin(some[:, None] * len(own) + items, pairs)
            scores[none] = -np.inf
            best = np.argsort(none, axis=1, kind="stable")[:, :k]  # they are sorted already
            score_EK[some, : best.shape[1]] = np.take_along_axis(scores, best, 1)
            item_EK[some, : best.shape[1]] = np.take_along_axis(items, best, 1) + own.start
            left, width = np.setdiff1d(left, some), _WIDER * width
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
