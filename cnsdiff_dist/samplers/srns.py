"""Robust negatives by the variance of their scores (SRNS), without its memory.

Ding et al., "Simplify and Robustify Negative Sampling for Implicit Collaborative Filtering",
NeurIPS 2020: a false negative scores high and steadily, so j = argmax of
P(j) + beta std(P(j)) with P(j) = sigmoid(s(u, j) - s(u, i)). Two things differ. The paper's
candidates are a memory per user, renewed each epoch by score; here they are M fresh uniform
items. The paper's deviation is over the last 5 epochs of the pair; here it is over 5 random
subspaces of the embedding, P_k(j) = sigmoid(2 (h_u * m_k) . (h_j - h_i)) with each mask m_k
keeping a dimension with probability 1/2: how much the score hangs on few dimensions stands in
for how unsteady it is in time. So there is no state: nothing to save, the same after a resume.

Shapes: K subspaces.
"""

import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, chosen, scores

_SUBSPACES = 5


class SRNSSampler(UniformSampler):
    def __init__(self, graph: GraphArrays, count: int, beta: float) -> None:
        super().__init__(graph, count)
        self._beta = beta

    @torch.no_grad()
    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        positive_B, score_BM = scores(latents)
        dim = latents.user_BD.shape[1]
        kept = torch.from_numpy(draws.uniform(_SUBSPACES * dim) < 0.5).to(score_BM)
        masked_BKD = 2 * kept.unflatten(1, (_SUBSPACES, dim)) * latents.user_BD[:, None]
        margin_BKM = torch.einsum("bkd,bmd->bkm", masked_BKD, latents.candidate_BMD)
        margin_BKM -= torch.einsum("bkd,bd->bk", masked_BKD, latents.positive_BD)[:, :, None]
        std_BM = margin_BKM.sigmoid().std(1, unbiased=False)
        likelihood_BM = (score_BM - positive_B[:, None]).sigmoid()
        column_B = (likelihood_BM + self._beta * std_BM).argmax(1)
        with torch.enable_grad():  # the negative itself belongs to the tables
            return chosen(latents, column_B)
