"""MixGCF: the positive is mixed into every candidate, then the hardest mixture is the negative.

Huang et al., "MixGCF: An Improved Training Method for Graph Neural Network-based Recommender
Systems", KDD 2021: h'_j = a_j h_i + (1 - a_j) h_j with a scalar a_j ~ U(0, 1) per candidate,
hardest by s(u, h'_j). Hop mixing is left out. The paper mixes and picks per propagation layer and
pools what it picked; a sampler here sees only the encoder's pooled output, so it does both once.
"""

from typing import Literal

import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, pick
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives


class MixGCFSettings(CandidateSettings):
    kind: Literal["mixgcf"] = "mixgcf"


class MixGCFSampler(CandidateSampler[MixGCFSettings]):
    settings_type = MixGCFSettings

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        candidate_BMD = encoded.candidate_BMD
        share_BM1 = torch.from_numpy(draws.uniform(candidate_BMD.shape[1])[:, :, None])
        mixed_BMD = candidate_BMD.lerp(encoded.positive_BD[:, None], share_BM1.to(candidate_BMD))
        with torch.no_grad():
            column_B = torch.einsum("bd,bmd->bm", encoded.user_BD, mixed_BMD).argmax(1)
        hard_BD = pick(mixed_BMD, column_B)
        return Negatives(hard_BD[:, None], contrast=(hard_BD,), hard_BD=hard_BD.detach())
