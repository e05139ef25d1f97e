"""Robust negatives by the variance of their scores (SRNS), without its memory.

Ding et al., "Simplify and Robustify Negative Sampling for Implicit Collaborative Filtering",
NeurIPS 2020: a false negative scores high and steadily, so j = argmax of
P(j) + beta std(P(j)) with P(j) = sigmoid(s(u, j) - s(u, i)). Two things differ. The paper's
candidates are a memory per user, renewed each epoch by score; here they are M fresh uniform
items. The paper's deviation is over the last 5 epochs of the pair; here it is over 5 random
subspaces of the embedding, P_f(j) = sigmoid(2 (h_u * m_f) . (h_j - h_i)), where each mask m_f
keeps a dimension with probability 1/2: how much the score hangs on few dimensions stands in
for how unsteady it is in time. So there is no state to save, and a resume changes nothing.

Shapes: F subspaces.
"""

from typing import Literal

import torch
from pydantic import Field

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, choose, scores
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives

_SUBSPACES = 5


class SRNSSettings(CandidateSettings):
    kind: Literal["srns"] = "srns"
    hardness: float = Field(0.5, gt=0, description="beta, the weight of the deviation")


class SRNSSampler(CandidateSampler[SRNSSettings]):
    settings_type = SRNSSettings

    @torch.no_grad()
    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        positive_B, score_BM = scores(encoded)
        dim = encoded.user_BD.shape[1]
        kept = torch.from_numpy(draws.uniform(_SUBSPACES * dim) < 0.5).to(score_BM)
        masked_BFD = 2 * kept.unflatten(1, (_SUBSPACES, dim)) * encoded.user_BD[:, None]
        margin_BFM = torch.einsum("bfd,bmd->bfm", masked_BFD, encoded.candidate_BMD)
        margin_BFM -= torch.einsum("bfd,bd->bf", masked_BFD, encoded.positive_BD)[:, :, None]
        std_BM = margin_BFM.sigmoid().std(1, unbiased=False)
        likelihood_BM = (score_BM - positive_B[:, None]).sigmoid()
        column_B = (likelihood_BM + self.settings.hardness * std_BM).argmax(1)
        with torch.enable_grad():  # the negative itself belongs to the tables
            return choose(encoded, column_B)
