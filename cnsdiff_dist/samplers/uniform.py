"""Uniform negatives among the items a user has not interacted with (Rendle et al. 2009)."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import to_device
from cnsdiff_dist.samplers.protocol import Latents, Negatives


class UniformSampler:
    """All of ``count`` uniform items a row; other samplers choose among such candidates."""

    def __init__(self, graph: GraphArrays, count: int = 1) -> None:
        self._graph, self._count = graph, count
        self.network: nn.Module | None = None

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        uniform = draws.uniform(self._count).ravel()
        users, items = (np.repeat(ids, self._count) for ids in (batch.users, batch.items))
        return non_interacted(self._graph, users, items, uniform).reshape(
            len(batch.users), self._count
        )

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        item_BN = to_device(torch.from_numpy(latents.candidates), latents.user_BD.device)
        return Negatives(latents.candidate_BMD, item_BN)


def chosen(latents: Latents, column_B: Tensor) -> Negatives:
    """One candidate a row, by its column."""
    item_BM = to_device(torch.from_numpy(latents.candidates), column_B.device)
    vector_BD, item_B = picked(latents.candidate_BMD, column_B), picked(item_BM, column_B)
    return Negatives(vector_BD[:, None], item_B[:, None])


def picked(values: Tensor, column_B: Tensor) -> Tensor:
    """Of each row the entry in its column: [B, M, ...], int64 [B] -> [B, ...]."""
    return values[torch.arange(len(column_B), device=column_B.device), column_B]


@torch.no_grad()
def scores(latents: Latents) -> tuple[Tensor, Tensor]:
    """Scores of the positive [B] and of the candidates [B, M], without gradient."""
    positive_B = (latents.user_BD * latents.positive_BD).sum(1)
    return positive_B, torch.einsum("bd,bmd->bm", latents.user_BD, latents.candidate_BMD)


def non_interacted(
    graph: GraphArrays,
    users: npt.NDArray[np.int64],
    positives: npt.NDArray[np.int64],
    uniform: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """One item per user, uniform over those absent from its train row, int64 [B].

    No rejection: rank r = floor(uniform x (I - degree)) among the absent items is found by
    bisection, since the k-th item p_k of a user's sorted row has p_k - k absent items
    before it. A user who has them all gets its positive back, which teaches nothing.
    """
    items = len(graph.item_indptr) - 1
    start = np.asarray(graph.user_indptr[users])
    degree = np.asarray(graph.user_indptr[users + 1]) - start
    rank = np.minimum((uniform * (items - degree)).astype(np.int64), items - degree - 1)
    low, high = np.zeros_like(degree), degree.copy()
    for _ in range(int(degree.max(initial=0)).bit_length()):
        open_ = low < high
        middle = (low + high) // 2
        item = graph.user_items[np.where(open_, start + middle, 0)]
        before = open_ & (item - middle <= rank)
        low = np.where(before, middle + 1, low)
        high = np.where(open_ & ~before, middle, high)
    return np.where(degree < items, rank + low, positives)
