"""MixGCF: the positive is mixed into every candidate, then the hardest mixture is the negative.

Huang et al., "MixGCF: An Improved Training Method for Graph Neural Network-based Recommender
Systems", KDD 2021: h'_j = a h_i + (1 - a) h_j with a ~ U(0, 1) per candidate and dimension,
hardest by s(u, h'_j). The paper mixes and picks per propagation layer and pools the picks (hop
mixing); samplers here see the encoder's pooled output, so both steps happen once, on that.
"""

import torch

from cnsdiff_dist.draws import Draws
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler


class MixGCFSampler(UniformSampler):
    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        rows, per_row, dim = latents.candidate_BMD.shape
        share = torch.from_numpy(draws.uniform(per_row * dim)).to(latents.candidate_BMD)
        share_BMD = share.view(rows, per_row, dim)
        mixed_BMD = share_BMD * latents.positive_BD[:, None] + (1 - share_BMD) * (
            latents.candidate_BMD
        )
        with torch.no_grad():
            column_B = torch.einsum("bd,bmd->bm", latents.user_BD, mixed_BMD).argmax(1)
        hard_BD = mixed_BMD[torch.arange(rows, device=column_B.device), column_B]
        return Negatives(hard_BD[:, None], contrast=(hard_BD,), hard_BD=hard_BD.detach())
