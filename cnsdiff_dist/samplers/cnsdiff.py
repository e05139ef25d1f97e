"""CNSDiff: negatives synthesised in latent space by conditional diffusion.

Zhao et al., "Causal Negative Sampling via Diffusion Model for Out-of-Distribution
Recommendation", arXiv 2508.07243; docs/method.md says what differs here and why.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models import losses
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.diffusion import Denoise, make_schedule, q_sample, reverse_levels
from cnsdiff_dist.samplers.pools import KnownPositives, batch_offsets
from cnsdiff_dist.samplers.protocol import Latents, Negatives, Pool
from cnsdiff_dist.samplers.uniform import UniformSampler, picked


class CNSDiffSampler:
    """``negatives.share`` says who sees a generated negative.

    ``row``: only its own row, mixed with a uniform item as in the paper. ``group``: every row
    of its group, in one pool with the group's positives; what a softmax wants.
    """

    def __init__(self, config: Config, graph: GraphArrays, environments: int, world: World) -> None:
        self._config, self._loss, self._negatives = config.generator, config.loss, config.negatives
        self._cosine = config.objective.similarity == "cosine"
        self._world, self._uniform = world, UniformSampler(graph)
        self._known = KnownPositives(graph)
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
        if self._negatives.share == "group":
            return np.empty((len(batch.users), 0), np.int64)
        return self._uniform.candidates(batch, draws)

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        """Negatives from one reverse chain per row, and the diffusion loss."""
        if self._negatives.share == "group":
            made = self.generate(latents, draws, whole=False)
            made_GSD = torch.cat(
                [rows.unflatten(0, (latents.groups, -1)) for rows in made.vector_LbD], dim=1
            )
            if self._cosine:
                made_GSD = functional.normalize(made_GSD, dim=2)
            return Negatives(
                latents.candidate_BMD, pool=self._pool(made_GSD, latents),
                hard_BD=made_GSD.flatten(0, 1), terms=made.terms, observed=made.observed,
            )  # fmt: skip
        made = self.generate(latents, draws, whole=True)
        hard_BD = hardest(made.vector_LbD, latents.user_BD)
        mix_B = draws.beta(*self._mix_at(progress))
        mixed = mixture(hard_BD, latents.candidate_BMD[:, 0], mix_B)
        return replace(mixed, terms=made.terms, observed=made.observed)

    def generate(self, latents: Latents, draws: Draws, whole: bool) -> "Generated":
        """Learn from a share of the rows, and generate for those rows or for the ``whole``
        batch, one vector per level and row."""
        positive_BD, some = latents.positive_BD, self._some(latents)
        standard = Standard(latents, some, self._world)
        z0_BD = standard.item(positive_BD.detach() if self._config.detach else positive_BD)
        user_BD = standard.user(latents.user_BD.detach())
        diffusion_B, error_B = self._learn(z0_BD, user_BD, some, latents, draws)
        with torch.no_grad():
            noise_BD = draws.normal(z0_BD.shape[1])
            rows = slice(None) if whole else some
            made_LbD = self._chain(
                z0_BD[rows], user_BD[rows], latents.environment[rows], noise_BD[rows]
            )
        return Generated(
            standard.raw_item(made_LbD),
            {"diffusion": self._loss.diffusion * diffusion_B},
            {"denoising_error": error_B},
        )

    def _some(self, latents: Latents) -> Tensor:
        """The first ``train_share`` of each group's rows: rows come shuffled, so any will do."""
        rows = torch.arange(len(latents.weight), device=latents.weight.device)
        rows = rows.view(latents.groups, -1)
        return rows[:, : max(1, round(rows.shape[1] * self._config.train_share))].flatten()

    def _learn(
        self, z0_BD: Tensor, user_BD: Tensor, some: Tensor, latents: Latents, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """The diffusion loss and the denoising error [B] of ``some`` rows, scaled so that
        their means are unbiased; 0 elsewhere."""
        t_B, noise_BD = draws.integers(self._config.steps), draws.normal(z0_BD.shape[1])
        loss_b, error_b = losses.diffusion(
            self._denoise(user_BD[some], latents.environment[some]), z0_BD[some], t_B[some],
            noise_BD[some], self._schedule, self._config.snr_clip, self._loss.causal,
        )  # fmt: skip
        scale = len(z0_BD) / len(some)
        zero_B = torch.zeros_like(z0_BD[:, 0])
        return (
            zero_B.index_copy(0, some, loss_b * scale),
            zero_B.index_copy(0, some, error_b * scale),
        )

    def _denoise(self, user_BD: Tensor, environment_B: Tensor) -> Denoise:
        network = self.network
        assert network is not None
        return lambda zt_BD, t_B: network(zt_BD, t_B, user_BD, environment_B)

    def _chain(
        self, z0_BD: Tensor, user_BD: Tensor, environment_B: Tensor, noise_BD: Tensor
    ) -> Tensor:
        """Candidates at every noise level from one reverse chain, [levels, B, D]."""
        levels = self._config.levels
        t_B = torch.full((len(z0_BD),), levels[-1] - 1, device=z0_BD.device)
        zt_BD = q_sample(z0_BD, t_B, noise_BD, self._schedule)
        return reverse_levels(self._denoise(user_BD, environment_B), zt_BD, levels, self._schedule)

    def _pool(self, made_GSD: Tensor, latents: Latents) -> Pool:
        """The group's positives and what was generated from some of them, [groups, G + S, D].

        A generated vector stands for as many as there are rows for each that was generated
        from: the log of that is its offset. One that the user likes as much as the positive,
        or nearly, is left out of the row: it may well be a positive that was not seen.
        """
        weight_GB, levels = latents.weight.view(latents.groups, -1), len(self._config.levels)
        width, made = weight_GB.shape[1], made_GSD.shape[1] // levels
        weight_GM = weight_GB[:, :made]
        offset_GM = torch.full_like(weight_GM, math.log(width / made))
        offset_GM = offset_GM.masked_fill(weight_GM == 0, -torch.inf)
        offset_BS = offset_GM.repeat(1, levels).repeat_interleave(width, 0)
        if self._negatives.margin is not None:
            liked_BS = too_close(made_GSD, latents, self._negatives.margin)
            offset_BS = offset_BS.masked_fill(liked_BS, -torch.inf)
        return Pool(
            torch.cat([latents.positive_BD.unflatten(0, (latents.groups, -1)), made_GSD], dim=1),
            torch.cat([batch_offsets(self._known, latents), offset_BS], dim=1),
        )

    def _mix_at(self, progress: float) -> tuple[float, float]:
        (a0, b0), (a1, b1) = self._negatives.mix_start, self._negatives.mix_end
        return a0 + progress * (a1 - a0), b0 + progress * (b1 - b0)


@dataclass(frozen=True)
class Generated:
    """``vector_LbD``: one vector per level and row asked for, on the latents' scale."""

    vector_LbD: Tensor
    terms: dict[str, Tensor]
    observed: dict[str, Tensor]


def mixture(hard_BD: Tensor, random_BD: Tensor, mix_B: Tensor) -> Negatives:
    """z_neg = lambda z_hard + (1 - lambda) h_j, one negative a row."""
    mix_B1 = mix_B[:, None]
    return Negatives(
        (mix_B1 * hard_BD + (1 - mix_B1) * random_BD)[:, None], hard_BD=hard_BD,
        contrast=(hard_BD, random_BD),
    )  # fmt: skip


@torch.no_grad()
def too_close(vector_GSD: Tensor, latents: Latents, margin: float) -> Tensor:
    """Whether cos(h_u, vector) > cos(h_u, h_i) - margin, for each row and vector of its group,
    bool [B, S]."""
    user_BD, positive_BD = (
        functional.normalize(rows, dim=1) for rows in (latents.user_BD, latents.positive_BD)
    )
    bound_B1 = (user_BD * positive_BD).sum(1, keepdim=True) - margin
    user_GWD = user_BD.unflatten(0, (latents.groups, -1))
    vector_GDS = functional.normalize(vector_GSD, dim=2).transpose(1, 2)
    return torch.bmm(user_GWD, vector_GDS).flatten(0, 1) > bound_B1


@torch.no_grad()
def hardest(candidates_LBD: Tensor, user_BD: Tensor) -> Tensor:
    """Per row, the candidate with the highest user score, [B, D]."""
    score_LB = torch.einsum("lbd,bd->lb", candidates_LBD, user_BD)
    return picked(candidates_LBD.transpose(0, 1), score_LB.argmax(0))


class Standard:
    """Per-dimension mean and standard deviation of positives and users, over ``rows`` of
    every rank.

    The generator works on latents of mean 0 and variance 1, whatever the tables' scale is;
    that is what makes a noise schedule and a learning rate mean the same on every dataset.
    """

    def __init__(self, latents: Latents, rows: Tensor, world: World) -> None:
        with torch.no_grad():
            # float64: the variance is a small difference of large sums.
            weight_b = latents.weight[rows].double()
            both = torch.cat([latents.positive_BD[rows], latents.user_BD[rows]], dim=1).double()
            sums = torch.stack([weight_b @ both, weight_b @ both.square()])
            count = weight_b.sum().expand(2, 1)
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
