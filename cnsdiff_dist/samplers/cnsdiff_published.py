"""CNSDiff as its authors' code does it, defects kept, so that the difference can be seen.

Zhao et al., arXiv 2508.07243. Kept: the denoiser is never trained (its optimizer is never
stepped), its dropout stays on while sampling, latents are not standardised, no condition, the
``linear-var`` schedule that ends at alpha_bar 0.998, one stochastic chain over all T steps from
noise levels 10, 14 and 18 each, and lambda from Beta(1, 9) to Beta(9, 1). Its contrastive term is
``loss.contrastive`` 0.3 at ``loss.temperature`` 2. Its diffusion loss reaches nothing here.
"""

from functools import partial

import torch
from torch import Tensor

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.diffusion import make_schedule, p_sample, q_sample
from cnsdiff_dist.samplers.cnsdiff import hardest, mixture
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler

_LEVELS = (10, 14, 18)
_DROPOUT = 0.1


class PublishedSampler(UniformSampler):
    def __init__(self, config: Config, graph: GraphArrays, world: World) -> None:
        super().__init__(graph)
        self._steps = config.generator.steps
        self._schedule = make_schedule("linear-var", self._steps).to(world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            frozen = Denoiser(config.model.dim, self._steps, config.model.dim, 0, user=False)
        self._denoiser = frozen.to(world.device).requires_grad_(False)

    @torch.no_grad()
    def _hard(self, latents: Latents, draws: Draws) -> Tensor:
        z0_BD = latents.positive_BD
        made = []
        for level in _LEVELS:
            t_B = torch.full_like(latents.environment, level - 1)
            zt_BD = q_sample(z0_BD, t_B, draws.normal(z0_BD.shape[1]), self._schedule)
            for t in reversed(range(self._steps)):
                noise_BD = draws.normal(z0_BD.shape[1]) if t else torch.zeros_like(z0_BD)
                zt_BD = p_sample(
                    partial(self._denoise, draws), zt_BD, torch.full_like(t_B, t),
                    self._schedule, noise_BD,
                )  # fmt: skip
            made.append(zt_BD)
        return hardest(torch.stack(made), latents.user_BD)

    def _denoise(self, draws: Draws, zt_BD: Tensor, t_B: Tensor) -> Tensor:
        keep = torch.from_numpy(draws.uniform(zt_BD.shape[1])).to(zt_BD.device) >= _DROPOUT
        return self._denoiser(zt_BD * keep / (1 - _DROPOUT), t_B, zt_BD, t_B)

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        hard_BD, random_BD = self._hard(latents, draws), latents.candidate_BMD[:, 0]
        return mixture(hard_BD, random_BD, draws.beta(1 + 8 * progress, 9 - 8 * progress))
