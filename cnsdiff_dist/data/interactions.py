"""The (user, item) pairs of a split in memory, to look up whether an item is a user's positive.

Shapes: B users or pairs that are looked up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.data.graph import lower_bound


@dataclass(frozen=True)
class Interactions:
    """The distinct (user, item) pairs of a split in CSR, with a user's items ascending.

    Attributes:
        indptr: int64 [U + 1].
        items: int64 [pairs].
    """

    indptr: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]

    @classmethod
    def from_pairs(
        cls, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64], shape: tuple[int, int]
    ) -> "Interactions":
        """Build the CSR from pairs in any order, int64 [pairs] each; ``shape`` is (U, I)."""
        keys = np.unique(users * shape[1] + items)
        counts = np.bincount(keys // shape[1], minlength=shape[0])
        return cls(np.concatenate([[0], np.cumsum(counts)]), keys % shape[1])

    def of(
        self, users: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the pairs of ``users`` [B].

        Returns:
            The position of each pair's user in ``users``, and its item, both int64 [pairs].
        """
        starts = np.asarray(self.indptr[users])
        counts = np.asarray(self.indptr[users + 1]) - starts
        position = np.repeat(np.arange(len(users)), counts)
        offset = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        return position, np.asarray(self.items[starts[position] + offset], np.int64)

    def contain(
        self, users: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Look up by bisection whether each (user, item) is a pair of the split: bool [B]."""
        end = np.asarray(self.indptr[users + 1])
        low = lower_bound(self.items, np.asarray(self.indptr[users]), end, items)
        return (low < end) & (self.items[np.minimum(low, max(len(self.items) - 1, 0))] == items)
