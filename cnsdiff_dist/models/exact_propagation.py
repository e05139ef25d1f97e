"""Exact LightGCN over the whole graph; each rank computes the output of the rows that it owns.

The work is done on the host in bounded memory. Beside its tables a rank holds its rows twice, and
one piece of the other ranks' rows while it multiplies with them. In each layer every rank receives
every row once.

Shapes: R rows of a table that this rank owns, O those of the other side of the graph, C rows of a
piece of the other side, D embedding dimension.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays, lower_bound
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models.lightgcn import csr

Places = npt.NDArray[np.int64]
PIECE_BYTES = 1 << 28
"""The size of a piece of the other side's rows, at most."""
ROWS, EDGES = 1 << 16, 1 << 22
"""The rows and edges of one sparse product, at most."""


@torch.no_grad()
def propagate_own(
    tables: ShardedTables, graph: GraphArrays, layers: int, world: World
) -> tuple[Tensor, Tensor]:
    """Return the mean of H_0 .. H_layers of this rank's users and items. Collective.

    Both are [R, D] on the host.
    """
    out = [tables.own_rows("user"), tables.own_rows("item")]
    sides = [
        _Side(graph.user_indptr, graph.user_items, graph.items, world),
        _Side(graph.item_indptr, graph.item_users, graph.users, world),
    ]
    for _ in range(layers):
        out = _layer(tables, sides, out)
    for rows_RD in out:
        rows_RD /= layers + 1
    return out[0], out[1]


def _layer(tables: ShardedTables, sides: list["_Side"], out: list[Tensor]) -> list[Tensor]:
    """Return x + Â out, a step of Horner's scheme as in ``models/lightgcn.py``.

    ``out`` is scaled in place, because it is not needed afterwards. This is a function so that its
    loop variables do not keep the rows of a layer alive.
    """
    for side, rows_RD in zip(sides, out, strict=True):
        rows_RD *= side.scale_R1
    new = [tables.own_rows("user"), tables.own_rows("item")]
    for side, rows_RD, others_OD in zip(sides, new, (out[1], out[0]), strict=True):
        side.add_product(rows_RD, others_OD)
    return new


class _Side:
    """One direction of the graph, from the rows of one side that this rank owns."""

    def __init__(
        self, indptr: Places, indices: npt.NDArray[np.integer], columns: int, world: World
    ) -> None:
        own = world.own_rows(len(indptr) - 1)
        self._indices, self._columns, self._world = indices, columns, world
        self._start = np.asarray(indptr[own.start : own.stop])
        self._stop = np.asarray(indptr[own.start + 1 : own.stop + 1])
        degree = torch.from_numpy(np.maximum(self._stop - self._start, 1))
        self.scale_R1 = degree.double().rsqrt().float()[:, None]

    def add_product(self, rows_RD: Tensor, others_OD: Tensor) -> None:
        """Add D^-1/2 A H to ``rows_RD``, where H is the other side's rows of all ranks.

        Each rank gives the rows of H that it owns, already scaled, as ``others_OD``. Collective.
        """
        world, dim = self._world, rows_RD.shape[1]
        step, cursor = max(PIECE_BYTES // (4 * dim), 1), self._start
        for source in range(world.size):
            owned = world.rows_of(source, self._columns)
            for first in range(owned.start, owned.stop, step):
                size = min(step, owned.stop - first)
                if source == world.rank:
                    piece_CD = others_OD[first - owned.start :][:size]
                else:
                    piece_CD = rows_RD.new_empty(size, dim)
                world.broadcast_tensor(piece_CD, source)
                cursor = self._add_piece(rows_RD, piece_CD, first, cursor)

    def _add_piece(self, rows_RD: Tensor, piece_CD: Tensor, first: int, cursor: Places) -> Places:
        """Add the product with one piece of the other side's rows.

        Args:
            first: the row of the other side at which the piece begins.
            cursor: where the edges into the piece begin in the index array, [R].

        Returns:
            Where they end, [R].
        """
        stop = self._stop
        if first + len(piece_CD) < self._columns:
            stop = lower_bound(self._indices, cursor, stop, first + len(piece_CD))
        total = np.concatenate([[0], np.cumsum(stop - cursor)])
        low = 0
        while low < len(cursor):
            high = int(np.searchsorted(total, total[low] + EDGES, side="right")) - 1
            # A row with more than EDGES edges is multiplied alone.
            high = min(max(high, low + 1), low + ROWS, len(cursor))
            indptr = total[low : high + 1] - total[low]
            adjacency = self._adjacency(cursor[low:high], indptr, first, len(piece_CD))
            rows_RD[low:high] += self.scale_R1[low:high] * (adjacency @ piece_CD)
            low = high
        return stop

    def _adjacency(self, start: Places, indptr: Places, first: int, columns: int) -> Tensor:
        """Return A between some rows and the ``columns`` rows from ``first`` of the other side.

        ``start`` says where the edges of each row begin in the index array.
        """
        edges = np.repeat(start - indptr[:-1], np.diff(indptr)) + np.arange(indptr[-1])
        column = self._indices[edges] - first
        return csr(
            torch.from_numpy(indptr.astype(np.int32)),
            torch.from_numpy(column.astype(np.int32)),
            torch.ones(len(column)),
            (len(start), columns),
        )
