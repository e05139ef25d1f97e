"""Robust negatives by the variance of their scores (SRNS).

Ding et al., "Simplify and Robustify Negative Sampling for Implicit Collaborative Filtering",
NeurIPS 2020: a false negative keeps a high score with low variance over the epochs, so
j = argmax of P(j | u) + beta std(P(j | u)) with P = sigmoid(s). The paper keeps a memory of
candidates per user and the scores of the last epochs. Here the memory is of the item, not of the
pair, kept by canonical stream: an exponential mean and mean square of P over the steps in which
the stream drew the item. So it costs 8 bytes per item and stream and is the same at any world
size; it is not in the checkpoint: a resumed run starts it afresh.
"""

import torch
from torch import Tensor

from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.draws import Draws
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, chosen, scores


class SRNSSampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, beta: float) -> None:
        super().__init__(graph, count)
        self._beta, self._items = beta, len(graph.item_indptr) - 1
        self._memory: dict[int, Tensor] = {}

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        _, score_BM = scores(latents)
        likelihood_BM = score_BM.sigmoid()
        item_BM = torch.from_numpy(latents.candidates).to(score_BM.device)
        parts = zip(
            latents.batch.streams, item_BM.chunk(latents.groups),
            likelihood_BM.chunk(latents.groups), strict=True,
        )  # fmt: skip
        std_BM = torch.cat([self._deviation(*part) for part in parts])
        return chosen(latents, (likelihood_BM + self._beta * std_BM).argmax(1))

    def _deviation(self, stream: int, item_GM: Tensor, likelihood_GM: Tensor) -> Tensor:
        """The standard deviation the stream's memory knows, then the memory moves on."""
        if stream not in self._memory:
            start = torch.tensor([0.5, 0.25], device=item_GM.device)
            self._memory[stream] = start.repeat(self._items, 1)
        memory = self._memory[stream]
        known = memory[item_GM]
        items, place = torch.unique(item_GM, return_inverse=True)
        sums = likelihood_GM.new_zeros(len(items), 3)
        rows = torch.stack([likelihood_GM, likelihood_GM**2, torch.ones_like(likelihood_GM)], dim=2)
        sums.index_add_(0, place.flatten(), rows.flatten(0, 1))
        memory[items] = 0.9 * memory[items] + 0.1 * sums[:, :2] / sums[:, 2:]
        return (known[..., 1] - known[..., 0] ** 2).clamp(min=0).sqrt()
