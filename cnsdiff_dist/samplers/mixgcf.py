"""MixGCF: the positive is mixed into every candidate, then the hardest mixture is the negative.

Huang et al., "MixGCF: An Improved Training Method for Graph Neural Network-based Recommender
Systems", KDD 2021: h'_j = a_j h_i + (1 - a_j) h_j with a scalar a_j ~ U(0, 1) per candidate,
hardest by s(u, h'_j). Left out: hop mixing. The paper mixes and picks per propagation layer and
pools the picks; samplers here see the encoder's pooled output, so both happen once, on that.
"""

import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler, picked


class MixGCFSampler(UniformSampler):
    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        per_row = latents.candidate_BMD.shape[1]
        share_BM1 = torch.from_numpy(draws.uniform(per_row)).to(latents.candidate_BMD)[:, :, None]
        mixed_BMD = latents.candidate_BMD.lerp(latents.positive_BD[:, None], share_BM1)
        with torch.no_grad():
            column_B = torch.einsum("bd,bmd->bm", latents.user_BD, mixed_BMD).argmax(1)
        hard_BD = picked(mixed_BMD, column_B)
        return Negatives(hard_BD[:, None], contrast=(hard_BD,), hard_BD=hard_BD.detach())
