"""Softmax negative sampling among candidates.

Softmax(rho, N) of Shi et al., "On the Theories Behind Hard Negative Sampling for
Recommendation", WWW 2023: among N uniform candidates, p(j) ~ exp(s(u, j) / rho).
"""

import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, chosen, scores


class SoftmaxSampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, rho: float) -> None:
        super().__init__(graph, count)
        self._rho = rho

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        _, score_BM = scores(latents)
        cumulative_BM = torch.softmax(score_BM.double() / self._rho, dim=1).cumsum(1)
        draw_B1 = torch.from_numpy(draws.uniform(1)).to(score_BM.device)
        column_B = torch.searchsorted(cumulative_BM, draw_B1 * cumulative_BM[:, -1:])[:, 0]
        return chosen(latents, column_B.clamp(max=score_BM.shape[1] - 1))
