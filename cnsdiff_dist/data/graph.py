"""The train graph as CSR arrays in both directions, written once and memory-mapped."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnsdiff_dist import storage
from cnsdiff_dist.data.node_cache import local_file
from cnsdiff_dist.data.schema import Blob, Manifest
from cnsdiff_dist.errors import UserError

Array = npt.NDArray[Any]
INDPTR = np.dtype("<i8")
FILE_BYTES = 1 << 30


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


def open_graph(url: str, manifest: Manifest, verify: bool = True) -> GraphArrays:
    """Memory-map the train graph of the dataset at ``url``.

    ``verify`` checks the content of local files, for which they are read whole: one rank of a
    node is enough.

    Raises:
        UserError: a file is missing, or is not what the manifest says.
    """
    graph = manifest.graph
    index = np.dtype(graph.index_dtype).newbyteorder("<")

    def array(blobs: tuple[Blob, ...], dtype: np.dtype[Any], length: int) -> Array:
        expected = length * dtype.itemsize
        if sum(blob.bytes for blob in blobs) != expected:
            raise UserError(
                f"{storage.display(url)}: {blobs[0].path} has not the {expected} bytes that its "
                "manifest's counts ask for; run `cnsdiff prepare` again"
            )
        path = local_file(url, blobs, verify)
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)

    return GraphArrays(
        user_indptr=array(graph.user_indptr, INDPTR, manifest.users + 1),
        user_items=array(graph.user_items, index, graph.edges),
        item_indptr=array(graph.item_indptr, INDPTR, manifest.items + 1),
        item_users=array(graph.item_users, index, graph.edges),
    )


def index_dtype(users: int, items: int) -> str:
    """The narrowest index type that can name every row: ``int32`` or ``int64``."""
    return "int32" if max(users, items) <= np.iinfo(np.int32).max else "int64"


def write_csr(
    root: Path, side: str, other: str, degrees: Iterable[Array], chunks: Iterable[Array],
    dtype: str, file_bytes: int = FILE_BYTES,
) -> tuple[list[str], list[str]]:  # fmt: skip
    """Write one direction of the graph; returns the paths under ``root`` of its two arrays.

    ``degrees`` yield the degree of row 0, row 1, ..; ``chunks`` the indices of row 0, row 1, ..,
    ascending in each row. Only a chunk of either is in memory.
    """
    pointers = _write(root, f"graph/{side}_indptr", _cumulated(degrees), file_bytes)
    little = np.dtype(dtype).newbyteorder("<")
    narrow = (chunk.astype(little) for chunk in chunks)
    return pointers, _write(root, f"graph/{side}_{other}s", narrow, file_bytes)


def _cumulated(degrees: Iterable[Array]) -> Iterator[Array]:
    total = np.zeros(1, INDPTR)
    yield total
    for chunk in degrees:
        sums = total[-1] + np.cumsum(chunk, dtype=INDPTR)
        yield sums
        total = sums if len(sums) else total


def _write(root: Path, name: str, arrays: Iterable[Array], file_bytes: int) -> list[str]:
    """One after the other, into files of ``file_bytes`` but the last."""
    paths, room = [f"{name}-00000.bin"], file_bytes
    file = (root / paths[0]).open("wb")
    try:
        for array in arrays:
            data = memoryview(array.tobytes())
            while len(data):
                if room == 0:
                    file.close()
                    paths.append(f"{name}-{len(paths):05d}.bin")
                    file, room = (root / paths[-1]).open("wb"), file_bytes
                part = data[:room]
                file.write(part)
                data, room = data[len(part) :], room - len(part)
    finally:
        file.close()
    return paths
