"""CNSDiff as its authors' code does it, defects kept, so that the difference can be seen.

Zhao et al., arXiv 2508.07243. These defects are kept: the denoiser is never trained (its optimizer
is never stepped), its dropout stays on while sampling, latents are not standardised, there is no
condition, the ``linear-var`` schedule ends at alpha_bar 0.998, one stochastic chain runs over all T
steps from each of the noise levels 10, 14 and 18, and lambda goes from Beta(1, 9) to Beta(9, 1).
Its contrastive term is ``loss.contrastive`` 0.3 at ``loss.temperature`` 2. Its diffusion loss
reaches no parameter, and is left out here.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.diffusion import make_schedule, p_sample, q_sample
from cnsdiff_dist.samplers.candidates import uniform_candidates
from cnsdiff_dist.samplers.cnsdiff import mixture
from cnsdiff_dist.samplers.latent_diffusion import hardest
from cnsdiff_dist.samplers.protocol import (
    EncodedBatch,
    Footprint,
    Ids,
    Negatives,
    Sampler,
    Surroundings,
)

_LEVELS = (10, 14, 18)
_DROPOUT = 0.1


class PublishedSettings(sections.Negatives):
    kind: Literal["cnsdiff_published"] = "cnsdiff_published"


class PublishedSampler(Sampler[PublishedSettings]):
    """One negative of each row from a denoiser with random weights, which nothing trains."""

    settings_type = PublishedSettings

    def __init__(self, settings: PublishedSettings, around: Surroundings) -> None:
        super().__init__(settings, around)
        self._steps, device = around.generator.steps, around.world.device
        self._schedule = make_schedule("linear-var", self._steps).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(around.seed)
            frozen = Denoiser(around.dim, self._steps, around.dim, 0, user=False)
        self._denoiser = frozen.to(device).requires_grad_(False)

    @classmethod
    def footprint(
        cls, settings: PublishedSettings, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=1, own=1)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return uniform_candidates(self.graph, batch, draws, 1)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        hard_BD, random_BD = self._hard(encoded, draws), encoded.candidate_BMD[:, 0]
        return mixture(hard_BD, random_BD, draws.beta(1 + 8 * progress, 9 - 8 * progress))

    @torch.no_grad()
    def _hard(self, encoded: EncodedBatch, draws: Draws) -> Tensor:
        z0_BD, denoise = encoded.positive_BD, partial(self._denoise, draws)
        made = []
        for level in _LEVELS:
            t_B = torch.full_like(encoded.environment_B, level - 1)
            zt_BD = q_sample(z0_BD, t_B, draws.normal(z0_BD.shape[1]), self._schedule)
            for t in reversed(range(self._steps)):
                noise_BD = draws.normal(z0_BD.shape[1]) if t else torch.zeros_like(z0_BD)
                now_B = torch.full_like(t_B, t)
                zt_BD = p_sample(denoise, zt_BD, now_B, self._schedule, noise_BD)
            made.append(zt_BD)
        return hardest(torch.stack(made), encoded.user_BD)

    def _denoise(self, draws: Draws, zt_BD: Tensor, t_B: Tensor) -> Tensor:
        keep = torch.from_numpy(draws.uniform(zt_BD.shape[1])).to(zt_BD.device) >= _DROPOUT
        return self._denoiser(zt_BD * keep / (1 - _DROPOUT), t_B, zt_BD, t_B)
