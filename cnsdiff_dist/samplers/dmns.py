"""Multi-level negatives from a diffusion conditioned on the query (DMNS).

Nguyen & Fang, "Diffusion-based Negative Sampling on Graphs for Link Prediction", WWW 2024: a
diffusion model learns p(h_positive | h_query); samples at several time steps of the reverse
chain are negatives of several levels of hardness, noisier being easier. Here the query is the user
and the levels are ``generator.levels``. Every level is a negative of its row, weighted by level:
log weights 0, -1, -2, .. from the noisiest on, as logit offsets, where the paper weights terms of
its loss. The denoiser and its loss are CNSDiff's, not the paper's; a level is the latent that is
predicted there, not the noised one; the chain starts from the noised positive, not from noise.
"""

from typing import Literal

import torch
from torch import nn

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.latent_diffusion import LatentDiffusionSampler, hardest
from cnsdiff_dist.samplers.protocol import EncodedBatch, Footprint, Ids, Negatives, no_candidates


class DMNSSettings(sections.Negatives):
    kind: Literal["dmns"] = "dmns"


class DMNSSampler(LatentDiffusionSampler[DMNSSettings]):
    """The user is the only condition; every level is kept, and nothing is mixed in."""

    settings_type = DMNSSettings

    @classmethod
    def make_network(
        cls, generator: sections.Generator, dim: int, environments: int
    ) -> nn.Module | None:
        by_user = generator.model_copy(update={"condition": ("user",)})
        return super().make_network(by_user, dim, environments)

    @classmethod
    def footprint(
        cls, settings: DMNSSettings, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=0, own=len(generator.levels))

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return no_candidates(batch)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        made = self.generate(encoded, draws, whole=True)
        vector_BLD = made.vector_LBD.transpose(0, 1)
        level_L = torch.arange(vector_BLD.shape[1], device=vector_BLD.device).float()
        return Negatives(
            vector_BLD,
            offset_BN=-level_L.expand(len(vector_BLD), -1),
            hard_BD=hardest(made.vector_LBD, encoded.user_BD),
            terms=dict(made.terms),
            observed=dict(made.observed),
        )
