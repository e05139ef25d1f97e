"""Multi-level negatives from a diffusion conditioned on the query (DMNS).

Nguyen & Fang, "Diffusion-based Negative Sampling on Graphs for Link Prediction", WWW 2024: a
diffusion model learns p(h_positive | h_query); samples at several time steps of the reverse
chain are negatives of several levels of hardness, noisier being easier. The query is the user; the
levels are ``generator.levels``; every level is a negative of its row, weighted by level: here
log weights 0, -1, -2, .. from the noisiest on, as logit offsets, where the paper weights terms of
its loss. The denoiser and its loss are CNSDiff's, not the paper's, and a level is the latent
predicted there, not the noised one; the chain starts from the noised positive, not from noise.
"""

import numpy as np
import numpy.typing as npt
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.samplers.cnsdiff import CNSDiffSampler, hardest
from cnsdiff_dist.samplers.protocol import Latents, Negatives


class DMNSSampler(CNSDiffSampler):
    """CNSDiff's machinery with the user as the only condition and no mixing; levels are kept."""

    def __init__(self, config: Config, graph: GraphArrays, environments: int, world: World) -> None:
        user_only = config.generator.model_copy(update={"condition": ("user",)})
        super().__init__(
            config.model_copy(update={"generator": user_only}), graph, environments, world
        )

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        return np.empty((len(batch.users), 0), np.int64)

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        made = self.generate(latents, draws, whole=True)
        vector_BLD = made.vector_LbD.transpose(0, 1)
        level = torch.arange(vector_BLD.shape[1], device=vector_BLD.device).float()
        return Negatives(
            vector_BLD, offset_BN=-level.expand(len(vector_BLD), -1),
            hard_BD=hardest(made.vector_LbD, latents.user_BD), terms=made.terms,
            observed=made.observed,
        )  # fmt: skip
