"""What samplers with a conditional diffusion model share: it learns from a step's positives and
generates vectors like them.

Shapes: B rows, b those that the model learns from, D embedding dimension, L noise levels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.models import losses
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.diffusion import Denoise, make_schedule, q_sample, reverse_levels
from cnsdiff_dist.samplers.candidates import pick
from cnsdiff_dist.samplers.protocol import EncodedBatch, Sampler, SettingsT, Surroundings


@dataclass(frozen=True)
class Generated:
    """``vector_LBD``: a vector per level and row asked for, on the scale of the encoder's output;
    ``terms`` and ``observed`` as in :class:`Negatives`."""

    vector_LBD: Tensor
    terms: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]


class LatentDiffusionSampler(Sampler[SettingsT]):
    """Trains a denoiser on the step's positives and samples from it."""

    def __init__(self, settings: SettingsT, around: Surroundings) -> None:
        super().__init__(settings, around)
        self._generator, self._loss, self._world = around.generator, around.loss, around.world
        schedule = make_schedule(self._generator.schedule, self._generator.steps)
        self._schedule = schedule.to(around.world.device)

    @classmethod
    def make_network(
        cls, generator: sections.Generator, dim: int, environments: int
    ) -> nn.Module | None:
        return Denoiser(
            dim,
            generator.steps,
            generator.hidden,
            environments if "environment" in generator.condition else 0,
            user="user" in generator.condition,
        )

    def generate(self, encoded: EncodedBatch, draws: Draws, whole: bool) -> Generated:
        """Learn from a share of the rows, and generate for those rows or for the ``whole``
        batch."""
        learned_b = self._rows_to_learn_from(encoded)
        standard = Standardiser(encoded, learned_b, self._world)
        positive_BD = encoded.positive_BD
        z0_BD = standard.item(positive_BD.detach() if self._generator.detach else positive_BD)
        user_BD = standard.user(encoded.user_BD.detach())
        diffusion_B, error_B = self._learn(z0_BD, user_BD, learned_b, encoded, draws)
        with torch.no_grad():
            noise_BD = draws.normal(z0_BD.shape[1])
            rows = slice(None) if whole else learned_b
            made_LBD = self._sample(
                z0_BD[rows], user_BD[rows], encoded.environment_B[rows], noise_BD[rows]
            )
        return Generated(
            standard.unstandardised_item(made_LBD),
            {"diffusion": self._loss.diffusion * diffusion_B},
            {"denoising_error": error_B},
        )

    def _rows_to_learn_from(self, encoded: EncodedBatch) -> Tensor:
        """The first ``train_share`` of each group's rows: rows come shuffled, so any will do."""
        rows_B = torch.arange(len(encoded.weight_B), device=encoded.weight_B.device)
        rows_GW = encoded.by_group(rows_B)
        return rows_GW[:, : rows_learned_from(self._generator, rows_GW.shape[1])].flatten()

    def _learn(
        self, z0_BD: Tensor, user_BD: Tensor, rows_b: Tensor, encoded: EncodedBatch, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """The diffusion loss and the denoising error of the rows ``rows_b``, [B] each.

        They are 0 elsewhere, and scaled so that their means over B rows are unbiased.
        """
        t_B, noise_BD = draws.integers(self._generator.steps), draws.normal(z0_BD.shape[1])
        loss_b, error_b = losses.diffusion(
            self._denoise(user_BD[rows_b], encoded.environment_B[rows_b]),
            z0_BD[rows_b],
            t_B[rows_b],
            noise_BD[rows_b],
            self._schedule,
            self._generator.snr_clip,
            self._loss.causal,
        )
        scale = len(z0_BD) / len(rows_b)
        zero_B = torch.zeros_like(z0_BD[:, 0])
        return (
            zero_B.index_copy(0, rows_b, loss_b * scale),
            zero_B.index_copy(0, rows_b, error_b * scale),
        )

    def _denoise(self, user_BD: Tensor, environment_B: Tensor) -> Denoise:
        network = self.network
        assert network is not None
        return lambda zt_BD, t_B: network(zt_BD, t_B, user_BD, environment_B)

    def _sample(
        self, z0_BD: Tensor, user_BD: Tensor, environment_B: Tensor, noise_BD: Tensor
    ) -> Tensor:
        """A vector at every noise level from one reverse chain per row, [L, B, D].

        The chain starts from the noised positive, at the noisiest level.
        """
        levels = self._generator.levels
        t_B = torch.full((len(z0_BD),), levels[-1] - 1, device=z0_BD.device)
        zt_BD = q_sample(z0_BD, t_B, noise_BD, self._schedule)
        return reverse_levels(self._denoise(user_BD, environment_B), zt_BD, levels, self._schedule)


def rows_learned_from(generator: sections.Generator, width: int) -> int:
    """How many of a group's ``width`` rows the generator learns from in a step."""
    return max(1, round(width * generator.train_share))


@torch.no_grad()
def hardest(vector_LBD: Tensor, user_BD: Tensor) -> Tensor:
    """Per row, the vector with the highest user score, [B, D]."""
    score_LB = torch.einsum("lbd,bd->lb", vector_LBD, user_BD)
    return pick(vector_LBD.transpose(0, 1), score_LB.argmax(0))


class Standardiser:
    """Per-dimension mean and standard deviation of positives and users, over some rows of every
    rank. Its constructor is collective.

    The generator works on latents of mean 0 and variance 1, whatever the scale of the tables is.
    So a noise schedule and a learning rate mean the same on every dataset.
    """

    def __init__(self, encoded: EncodedBatch, rows_b: Tensor, world: World) -> None:
        with torch.no_grad():
            # float64: the variance is a small difference of large sums.
            weight_b = encoded.weight_B[rows_b].double()
            vectors = [encoded.positive_BD[rows_b], encoded.user_BD[rows_b]]
            both = torch.cat(vectors, dim=1).double()
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

    def unstandardised_item(self, z_BD: Tensor) -> Tensor:
        """The inverse of :meth:`item`."""
        return z_BD * self.item_std + self._item_mean
