"""The train graph as CSR arrays in both directions, written once and memory-mapped."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
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


def lower_bound(indices: Array, start: Array, stop: Array, bound: Array | int) -> Array:
    """Find the first entry >= ``bound`` in each ascending run ``indices[start:stop]``.

    Bisects all runs at once.

    Args:
        start, stop: int64 [runs].
        bound: one number, or one per run.

    Returns:
        Positions in ``indices``, int64 [runs]; ``stop`` for a run without an entry >= ``bound``.
    """
    low, high = start.copy(), stop.copy()
    last = max(len(indices) - 1, 0)
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        searching, middle = low < high, (low + high) // 2
        below = searching & (indices[np.minimum(middle, last)] < bound)
        low, high = np.where(below, middle + 1, low), np.where(searching & ~below, middle, high)
    return low


@dataclass(frozen=True)
class GraphArrays:
    """The train graph in CSR, from the users and from the items. All arrays are read-only.

    User u's train items are ``user_items[user_indptr[u] : user_indptr[u + 1]]``, ascending.

    Attributes:
        user_indptr: int64 [U + 1].
        user_items: int32 or int64 [edges].
        item_indptr: int64 [I + 1].
        item_users: int32 or int64 [edges].
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
        """Count the train interactions of some items, int64.

        Only the entries of these items are read, so no array of the catalogue's length is made.
        """
        return np.asarray(self.item_indptr[items + 1]) - self.item_indptr[items]


def open_graph(url: str, manifest: Manifest, verify: bool = True) -> GraphArrays:
    """Memory-map the train graph of the dataset at ``url``.

    ``verify`` reads local files whole to check their content; one rank of a node is enough.

    Raises:
        UserError: a file is missing, or is not what the manifest says.
    """
    graph = manifest.graph
    index = np.dtype(graph.index_dtype).newbyteorder("<")
    mapped = partial(_mapped, url, verify)
    return GraphArrays(
        user_indptr=mapped(graph.user_indptr, INDPTR, manifest.users + 1),
        user_items=mapped(graph.user_items, index, graph.edges),
        item_indptr=mapped(graph.item_indptr, INDPTR, manifest.items + 1),
        item_users=mapped(graph.item_users, index, graph.edges),
    )


def _mapped(
    url: str, verify: bool, blobs: tuple[Blob, ...], dtype: np.dtype[Any], length: int
) -> Array:
    expected = length * dtype.itemsize
    if sum(blob.bytes for blob in blobs) != expected:
        raise UserError(
            f"{storage.display(url)}: {blobs[0].path} has not the {expected} bytes that its "
            "manifest's counts ask for; run `cnsdiff prepare` again"
        )
    path = local_file(url, blobs, verify)
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(length,)) if length else np.empty(0, dtype)


def index_dtype(users: int, items: int) -> str:
    """Return the narrowest index type for all users and items: ``int32`` or ``int64``."""
    return "int32" if max(users, items) <= np.iinfo(np.int32).max else "int64"


def write_csr(
    root: Path,
    side: str,
    other: str,
    degrees: Iterable[Array],
    neighbours: Iterable[Array],
    dtype: str,
    file_bytes: int = FILE_BYTES,
) -> tuple[list[str], list[str]]:
    """Write one direction of the graph, with one chunk of an array in memory at a time.

    Args:
        side, other: ``"user"`` and ``"item"``, or the reverse.
        degrees: chunks of the degrees of row 0, row 1, ...
        neighbours: chunks of the neighbours of row 0, row 1, ..., ascending in each row. They are
            read after all degrees.
        dtype: the type of the index array, see `index_dtype`.
        file_bytes: the size at which an array goes on in another file.

    Returns:
        The paths under ``root`` of the files of the indptr array and of the index array.
    """
    indptr = _write(root, f"graph/{side}_indptr", _cumulated(degrees), file_bytes)
    little = np.dtype(dtype).newbyteorder("<")
    indices = (chunk.astype(little) for chunk in neighbours)
    return indptr, _write(root, f"graph/{side}_{other}s", indices, file_bytes)


def _cumulated(degrees: Iterable[Array]) -> Iterator[Array]:
    total = np.zeros(1, INDPTR)
    yield total
    for chunk in degrees:
        sums = total[-1] + np.cumsum(chunk, dtype=INDPTR)
        yield sums
        total = sums if len(sums) else total


def _write(root: Path, name: str, arrays: Iterable[Array], file_bytes: int) -> list[str]:
    """Write the arrays one after the other; every file but the last has ``file_bytes``."""
    paths, space = [f"{name}-00000.bin"], file_bytes
    file = (root / paths[0]).open("wb")
    try:
        for array in arrays:
            data = memoryview(array.tobytes())
            while len(data):
                if space == 0:
                    file.close()
                    paths.append(f"{name}-{len(paths):05d}.bin")
                    file, space = (root / paths[-1]).open("wb"), file_bytes
                part = data[:space]
                file.write(part)
                data, space = data[len(part) :], space - len(part)
    finally:
        file.close()
    return paths
