"""The train graph as CSR arrays in both directions, written once and memory-mapped."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import Blob, Manifest
from cnsdiff_dist.errors import UserError

Array = npt.NDArray[Any]
INDPTR = np.dtype("<i8")


def before(indices: Array, start: Array, stop: Array, bound: Array | int) -> Array:
    """Of each ascending run ``indices[start:stop]`` the place of its first entry >= ``bound``.

    Bisection of all runs at once, int64 of the shape of ``start``.
    """
    low, high = start.copy(), stop.copy()
    last = max(len(indices) - 1, 0)
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        open_, middle = low < high, (low + high) // 2
        below = open_ & (indices[np.minimum(middle, last)] < bound)
        low, high = np.where(below, middle + 1, low), np.where(open_ & ~below, middle, high)
    return low


@dataclass(frozen=True)
class GraphArrays:
    """User u's train items are ``user_items[user_indptr[u] : user_indptr[u + 1]]``, ascending.

    ``item_indptr`` and ``item_users`` are the same edges seen from the items. The indptr
    arrays are int64 [rows + 1]; the index arrays int32 or int64 [edges]. All are read-only.
    """

    user_indptr: Array
    user_items: Array
    item_indptr: Array
    item_users: Array

    @property
    def users(self) -> int:
        return len(self.user_indptr) - 1

    @property
    def items(self) -> int:
        return len(self.item_indptr) - 1

    def item_degree(self, items: Array) -> Array:
        """Train interactions of some items, int64; read where they are, so that no array of the
        catalogue's length is made."""
        return np.asarray(self.item_indptr[items + 1]) - self.item_indptr[items]


def open_graph(url: str, manifest: Manifest) -> GraphArrays:
    """Memory-map the train graph of the dataset at ``url``.

    Raises:
        UserError: a file is missing, or is not as long as the manifest says.
    """
    graph = manifest.graph
    index = np.dtype(graph.index_dtype).newbyteorder("<")
    return GraphArrays(
        user_indptr=_open(url, graph.user_indptr, INDPTR, manifest.users + 1),
        user_items=_open(url, graph.user_items, index, graph.edges),
        item_indptr=_open(url, graph.item_indptr, INDPTR, manifest.items + 1),
        item_users=_open(url, graph.item_users, index, graph.edges),
    )


def _open(url: str, blob: Blob, dtype: np.dtype[Any], length: int) -> Array:
    source = storage.join(url, blob.path)
    path = storage.local_copy(source, blob.sha256)
    size, expected = path.stat().st_size, length * dtype.itemsize
    if size != expected or blob.bytes != expected:
        raise UserError(
            f"{storage.display(source)}: {size} bytes, where the manifest promises {expected}; "
            "the dataset is damaged, run `cnsdiff prepare` again"
        )
    if length == 0:
        return np.empty(0, dtype)  # an empty file cannot be mapped
    return np.memmap(path, dtype, "r", shape=(length,))


def index_dtype(users: int, items: int) -> str:
    """The narrowest index type that can name every row: ``int32`` or ``int64``."""
    return "int32" if max(users, items) <= np.iinfo(np.int32).max else "int64"


def write_csr(
    indptr: Path, indices: Path, degree: Array, chunks: Iterable[Array], dtype: str
) -> None:
    """Write one direction of the graph.

    ``degree`` is int64 [rows]; ``chunks`` yield the indices of row 0, row 1, .. one after
    the other, ascending in each row, so that only a chunk of the edges is in memory.
    """
    pointers = np.zeros(len(degree) + 1, INDPTR)
    np.cumsum(degree, out=pointers[1:])
    indptr.write_bytes(pointers.tobytes())
    with indices.open("wb") as file:
        for chunk in chunks:
            file.write(chunk.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
