"""Adaptive hardness negative sampling: the easier the positive already is, the easier its negative.

Lai et al., "Adaptive Hardness Negative Sampling for Collaborative Filtering", AAAI 2024:
j = argmin over M uniform candidates of | s(u, j) - beta (s(u, i) + alpha)^(p + 1) | with p < 0,
so that the wanted score falls as the positive's rises. Here p = -2 and alpha = 1; scores enter
through a sigmoid, so that the power is of a positive number on any scale; beta is
``negatives.hardness``.
"""

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, chosen, scores


class AHNSSampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, beta: float) -> None:
        super().__init__(graph, count)
        self._beta = beta

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        positive_B, score_BM = scores(latents)
        wanted_B = self._beta * (positive_B.sigmoid() + 1.0) ** -1.0
        return chosen(latents, (score_BM.sigmoid() - wanted_B[:, None]).abs().argmin(1))
