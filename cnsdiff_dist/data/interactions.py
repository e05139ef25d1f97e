"""The (user, item) pairs of a split in memory, and the questions that training and evaluation ask.

Shapes: B users or pairs that are asked about.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.graph import before


@dataclass(frozen=True)
class Interactions:
    """The (user, item) pairs of a split as a CSR, items ascending per user, each pair once.

    ``indptr`` int64 [users + 1], ``items`` int64 [pairs].
    """

    indptr: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]

    @classmethod
    def from_pairs(
        cls, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], shape: tuple[int, int]
    ) -> "Interactions":
        """Pairs in any order -> CSR; ``shape`` is (users, items)."""
        keys = np.unique(users * shape[1] + items)
        counts = np.bincount(keys // shape[1], minlength=shape[0])
        return cls(np.concatenate([[0], np.cumsum(counts)]), keys % shape[1])

    def of(
        self, users: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The pairs of some users: positions in ``users`` and items, both int64 [pairs]."""
        starts = np.asarray(self.indptr[users])
        counts = np.asarray(self.indptr[users + 1]) - starts
        row = np.repeat(np.arange(len(users)), counts)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return row, np.asarray(self.items[starts[row] + offset], np.int64)

    def contain(
        self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Whether each (user, item) is a pair of the split, by bisection, bool [B]."""
        end = np.asarray(self.indptr[users + 1])
        low = before(self.items, np.asarray(self.indptr[users]), end, items)
        return (low < end) & (self.items[np.minimum(low, max(len(self.items) - 1, 0))] == items)
