"""In-batch negatives: the other positives of the group, drawn by popularity as they come.

Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019: with ``log_q`` the logit of j loses log(G q(j)), q(j) = degree(j) / edges being how
often j is somebody's positive; without it the softmax learns log p(j|u) / p(j), popularity taken
out. The paper takes log q(j) from the positive's logit too, which a sampler cannot; the G of the
pool's size makes up for it: the sum over the pool then estimates that over the catalogue.
Mixed: Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in
Recommendations", WWW 2020: uniform negatives join the pool; with ``log_q`` each loses the log of
the expected number of times that it occurs in the whole of a row's negatives, from either source.

Shapes: G rows of a group, the pool's size.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.world import to_device
from cnsdiff_dist.samplers.pools import KnownPositives, batch_offsets
from cnsdiff_dist.samplers.protocol import Latents, Negatives, Pool
from cnsdiff_dist.samplers.uniform import UniformSampler


class InBatchSampler(UniformSampler):
    """``count`` uniform negatives a row beside the pool; 0 for in-batch alone."""

    def __init__(self, graph: GraphArrays, count: int, log_q: bool) -> None:
        super().__init__(graph, count)
        self._known, self._log_q = KnownPositives(graph), log_q
        self._degree, self._items = np.diff(graph.item_indptr), len(graph.item_indptr) - 1
        self._edges = max(len(graph.user_items), 1)

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        own = super().negatives(latents, draws, progress)
        offset_BG = batch_offsets(self._known, latents)
        item_GP = to_device(torch.from_numpy(latents.batch.items), offset_BG.device)
        item_GP = item_GP.view(latents.groups, -1)
        offset_BN = None
        if self._log_q:
            width = item_GP.shape[1]
            per_group = self._log_expected(latents.batch.items, width, offset_BG)
            offset_BG = offset_BG - per_group.view(latents.groups, width).repeat_interleave(
                width, dim=0
            )
            offset_BN = -self._log_expected(latents.candidates, width, offset_BG)
        pool_GPD = latents.positive_BD.unflatten(0, (latents.groups, -1))
        pool = Pool(pool_GPD, offset_BG, item_GP)
        return Negatives(own.vector_BND, own.item_BN, offset_BN, pool)

    def _log_expected(self, items: npt.NDArray[np.int64], width: int, like: Tensor) -> Tensor:
        """log of how often each item is expected among a row's negatives."""
        q = self._degree[items] / self._edges
        expected = q * width + self._count / self._items
        log = np.log(np.maximum(expected, 1e-12)).astype(np.float32)
        return to_device(torch.from_numpy(log), like.device)
