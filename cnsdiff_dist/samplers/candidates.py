"""Uniform candidates among the items that a user has not interacted with, and a choice of them.

Shapes: B rows of this rank, M candidates of a row, D embedding dimension.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.protocol import EncodedBatch, Footprint, Ids, Negatives, Sampler


class CandidateSettings(sections.Negatives):
    candidates: int = Field(8, ge=2, description="M, candidates of a row; one becomes its negative")


CandidateSettingsT = TypeVar("CandidateSettingsT", bound=CandidateSettings)


class CandidateSampler(Sampler[CandidateSettingsT]):
    """Looks up M uniform candidates of each row and makes one negative of them."""

    @classmethod
    def footprint(
        cls, settings: CandidateSettingsT, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=settings.candidates, own=1)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return uniform_candidates(self.graph, batch, draws, self.settings.candidates)


def uniform_candidates(graph: GraphArrays, batch: Batch, draws: Draws, count: int) -> Ids:
    """``count`` items of each row that its user has not interacted with, int64 [B, count]."""
    uniform = draws.uniform(count).ravel()
    users, items = (np.repeat(ids, count) for ids in (batch.users, batch.items))
    return non_interacted(graph, users, items, uniform).reshape(len(batch.users), count)


def choose(encoded: EncodedBatch, column_B: Tensor) -> Negatives:
    """The candidate in a row's column as its one negative."""
    vector_BD = pick(encoded.candidate_BMD, column_B)
    item_B = pick(encoded.candidate_item_BM, column_B)
    return Negatives(vector_BD[:, None], item_B[:, None])


def pick(values: Tensor, column_B: Tensor) -> Tensor:
    """The entry in a row's column: [B, M, ...], int64 [B] -> [B, ...]."""
    return values[torch.arange(len(column_B), device=column_B.device), column_B]


@torch.no_grad()
def scores(encoded: EncodedBatch) -> tuple[Tensor, Tensor]:
    """Scores of the positive [B] and of the candidates [B, M], without gradient."""
    positive_B = (encoded.user_BD * encoded.positive_BD).sum(1)
    return positive_B, torch.einsum("bd,bmd->bm", encoded.user_BD, encoded.candidate_BMD)


def non_interacted(
    graph: GraphArrays, users: Ids, positives: Ids, uniform: npt.NDArray[np.float64]
) -> Ids:
    """One item per user, uniform over those absent from its train row, int64 [B].

    Nothing is rejected and drawn again: rank r = floor(uniform x (I - degree)) among the absent
    items is found by bisection, since the k-th item p_k of a user's sorted row has p_k - k absent
    items before it. A user who has interacted with every item gets its positive back, from which
    nothing is learned.
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
