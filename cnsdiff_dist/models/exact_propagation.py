"""LightGCN over the whole graph, layer by layer, each rank for its own range of nodes.

Exact, on the host, in bounded memory: a rank holds its rows twice beside the tables, and a
piece of the others' rows while it is multiplied. Every rank sees every row once per layer.

Shapes: D embedding dim; R own rows of a side, C rows of a piece.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays, before
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models.lightgcn import csr

Places = npt.NDArray[np.int64]
PIECE_BYTES = 1 << 28  # of the others' rows
ROWS, EDGES = 1 << 16, 1 << 22  # multiplied at a time, at most


@torch.no_grad()
def propagate_own(
    tables: ShardedTables, graph: GraphArrays, layers: int, world: World
) -> tuple[Tensor, Tensor]:
    """h = mean(H0..HL) of this rank's users and items, [R, D] each on the host. Collective."""
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
    """x + Â out (Horner, as in models/lightgcn.py). Scales ``out`` in place, which is done with;
    a function of its own, so that no name of it outlives the layer and keeps the rows."""
    for side, rows_RD in zip(sides, out, strict=True):
        rows_RD *= side.scale_R1
    new = [tables.own_rows("user"), tables.own_rows("item")]
    for side, rows_RD, others in zip(sides, new, (out[1], out[0]), strict=True):
        side.add_product(rows_RD, others)
    return new


class _Side:
    """This rank's rows of one direction of the graph."""

    def __init__(
        self, indptr: Places, indices: npt.NDArray[np.integer], columns: int, world: World
    ) -> None:
        own = world.own(len(indptr) - 1)
        self._indices, self._columns, self._world = indices, columns, world
        self._start = np.asarray(indptr[own.start : own.stop])
        self._stop = np.asarray(indptr[own.start + 1 : own.stop + 1])
        degree = torch.from_numpy(np.maximum(self._stop - self._start, 1))
        self.scale_R1 = degree.double().rsqrt().float()[:, None]

    def add_product(self, rows_RD: Tensor, others_OD: Tensor) -> None:
        """rows += D^-1/2 A others, ``others`` being every rank's own, already scaled."""
        world, dim = self._world, rows_RD.shape[1]
        step, cursor = max(PIECE_BYTES // (4 * dim), 1), self._start
        for source in range(world.size):
            theirs = world.share(self._columns, source)
            for first in range(theirs.start, theirs.stop, step):
                size = min(step, theirs.stop - first)
                if source == world.rank:
                    piece_CD = others_OD[first - theirs.start :][:size]
                else:
                    piece_CD = rows_RD.new_empty(size, dim)
                world.spread(piece_CD, source)
                cursor = self._add_piece(rows_RD, piece_CD, first, cursor)

    def _add_piece(self, rows_RD: Tensor, piece_CD: Tensor, first: int, cursor: Places) -> Places:
        """Add the piece whose first row is ``first``; returns where its edges end."""
        stop = self._stop
        if first + len(piece_CD) < self._columns:
            stop = before(self._indices, cursor, stop, first + len(piece_CD))
        total = np.concatenate([[0], np.cumsum(stop - cursor)])
        low = 0
        while low < len(cursor):
            high = int(np.searchsorted(total, total[low] + EDGES, side="right")) - 1
            high = min(max(high, low + 1), low + ROWS, len(cursor))  # a hub is one of its own
            indptr = total[low : high + 1] - total[low]
            edges = np.repeat(cursor[low:high] - indptr[:-1], np.diff(indptr)) + np.arange(
                indptr[-1]
            )
            columns = self._indices[edges] - first
            operator = csr(
                torch.from_numpy(indptr.astype(np.int32)),
                torch.from_numpy(columns.astype(np.int32)),
                torch.ones(len(columns)),
                (high - low, len(piece_CD)),
            )
            rows_RD[low:high] += self.scale_R1[low:high] * (operator @ piece_CD)
            low = high
        return stop
