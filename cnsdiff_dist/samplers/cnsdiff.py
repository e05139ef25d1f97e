"""CNSDiff: negatives synthesised in latent space by conditional diffusion.

Zhao et al., "Causal Negative Sampling via Diffusion Model for Out-of-Distribution
Recommendation", arXiv 2508.07243; docs/method.md says what differs here and why.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cnsdiff_dist import losses
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.draws import Draws
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.diffusion import Denoise, make_schedule, q_sample, reverse_levels
from cnsdiff_dist.samplers.protocol import Latents, Negatives
from cnsdiff_dist.samplers.uniform import UniformSampler
from cnsdiff_dist.world import World


class CNSDiffSampler:
    def __init__(self, config: Config, graph: GraphArrays, environments: int, world: World) -> None:
        self._config, self._loss = config.generator, config.loss
        self._mix = (config.negatives.mix_start, config.negatives.mix_end)
        self._world, self._uniform = world, UniformSampler(graph)
        self._schedule = make_schedule(self._config.schedule, self._config.steps).to(world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.network: nn.Module | None = Denoiser(
                config.model.dim,
                self._config.steps,
                self._config.hidden,
                environments if "environment" in self._config.condition else 0,
                user="user" in self._config.condition,
            )

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        return self._uniform.candidates(batch, draws)

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        """z_neg = lambda z_hard + (1 - lambda) h_j, with the diffusion loss."""
        positive_BD = latents.positive_BD
        random_BD = latents.candidate_BMD[:, 0]
        standard = Standard(latents, self._world)
        z0_BD = standard.item(positive_BD.detach() if self._config.detach else positive_BD)
        user_BD = standard.user(latents.user_BD.detach())

        network = self.network

        def denoise(zt_BD: Tensor, t_B: Tensor) -> Tensor:
            assert network is not None
            return network(zt_BD, t_B, user_BD, latents.environment)

        dim = positive_BD.shape[1]
        diffusion_B, error_B = losses.diffusion(
            denoise, z0_BD, draws.integers(self._config.steps), draws.normal(dim),
            self._schedule, self._config.snr_clip, self._loss.causal,
        )  # fmt: skip
        with torch.no_grad():
            candidates = self._generate(denoise, z0_BD, draws.normal(dim))
            hard_BD = hardest(standard.raw_item(candidates), latents.user_BD)
        terms = {"diffusion": self._loss.diffusion * diffusion_B}
        mix_B1 = draws.beta(*self._mix_at(progress))[:, None]
        with torch.no_grad():
            margin_B = (latents.user_BD * (positive_BD - hard_BD)).sum(1)
        return Negatives(
            (mix_B1 * hard_BD + (1 - mix_B1) * random_BD)[:, None],
            contrast=(hard_BD, random_BD),
            terms=terms,
            observed={"denoising_error": error_B, "hard_above_positive": (margin_B < 0).float()},
        )

    def _generate(self, denoise: Denoise, z0_BD: Tensor, noise_BD: Tensor) -> Tensor:
        """Candidates at every noise level from one reverse chain, [levels, B, D]."""
        levels = self._config.levels
        t_B = torch.full((len(z0_BD),), levels[-1] - 1, device=z0_BD.device)
        zt_BD = q_sample(z0_BD, t_B, noise_BD, self._schedule)
        return reverse_levels(denoise, zt_BD, levels, self._schedule)

    def _mix_at(self, progress: float) -> tuple[float, float]:
        (a0, b0), (a1, b1) = self._mix
        return a0 + progress * (a1 - a0), b0 + progress * (b1 - b0)


def hardest(candidates_LBD: Tensor, user_BD: Tensor) -> Tensor:
    """Per row, the candidate with the highest user score, [B, D]."""
    score_LB = torch.einsum("lbd,bd->lb", candidates_LBD, user_BD)
    rows = torch.arange(len(user_BD), device=user_BD.device)
    return candidates_LBD[score_LB.argmax(0), rows]


class Standard:
    """Per-dimension mean and standard deviation of the global batch's positives and users.

    The generator works on latents of mean 0 and variance 1, whatever the tables' scale is;
    that is what makes a noise schedule and a learning rate mean the same on every dataset.
    """

    def __init__(self, latents: Latents, world: World) -> None:
        with torch.no_grad():
            # float64: the variance is a small difference of large sums.
            weight_B1 = latents.weight[:, None].double()
            rows = torch.cat([latents.positive_BD, latents.user_BD], dim=1).double()
            sums = torch.stack([(weight_B1 * rows).sum(0), (weight_B1 * rows * rows).sum(0)])
            count = weight_B1.sum().expand(2, 1)
            total = world.sum(torch.cat([sums, count], dim=1))
            mean, square = total[:, :-1] / total[:, -1:]
            std = (square - mean * mean).clamp(min=1e-12).sqrt()
            self._item_mean, self._user_mean = mean.float().chunk(2)
            self.item_std, self._user_std = std.float().chunk(2)

    def item(self, h_BD: Tensor) -> Tensor:
        return (h_BD - self._item_mean) / self.item_std

    def user(self, h_BD: Tensor) -> Tensor:
        return (h_BD - self._user_mean) / self._user_std

    def raw_item(self, z_BD: Tensor) -> Tensor:
        return z_BD * self.item_std + self._item_mean
