"""Gaussian diffusion in latent space, as pure functions that take their noise as an argument.

The equations are those of DDPM (Ho et al., "Denoising Diffusion Probabilistic Models", 2020).
DDPM counts the steps 1 .. T; here t runs from 0 to T - 1. ``alpha_bar[t]`` is the share of the
signal that is left at t, and t = T - 1 is the noisiest.

Shapes: B rows of the batch, D dimension of a latent, T diffusion steps, L noise levels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Predicts z_0 [B, D] from z_t [B, D] and t, int64 [B]."""


@dataclass(frozen=True)
class Schedule:
    """The coefficients of each t, float32 [T].

    Attributes:
        alpha_bar: the share of the signal that is left at t.
        previous: alpha_bar[t - 1]; 1 at t = 0.
    """

    alpha_bar: Tensor
    previous: Tensor

    @property
    def steps(self) -> int:
        return len(self.alpha_bar)

    @property
    def beta(self) -> Tensor:
        return 1 - self.alpha_bar / self.previous

    @property
    def snr(self) -> Tensor:
        """alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(self.alpha_bar.to(device), self.previous.to(device))


def make_schedule(kind: str, steps: int) -> Schedule:
    """Make a schedule of ``steps`` steps.

    ``cosine`` (Nichol and Dhariwal 2021, eq. 17) and ``linear`` end in noise: alpha_bar[T - 1] is
    below 0.05. ``linear-var`` is the schedule of the published CNSDiff code (scale 0.1, min 1e-4,
    max 0.02). Its alpha_bar ends at 0.998, and it is here for comparison only.
    """
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    if kind == "cosine":
        offset = 0.008
        alpha_bar = torch.cos((t / (steps + 1) + offset) / (1 + offset) * math.pi / 2) ** 2
    elif kind == "linear":
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        fine = torch.cumprod(1 - beta, 0)
        alpha_bar = fine[(t / steps * 1000).long() - 1]
    elif kind == "linear-var":
        alpha_bar = 1 - torch.linspace(0.1 * 1e-4, 0.1 * 0.02, steps, dtype=torch.float64)
    else:
        raise ValueError(f"unknown schedule {kind}")
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return Schedule(alpha_bar.float(), previous.float())


def q_sample(z0_BD: Tensor, t_B: Tensor, noise_BD: Tensor, schedule: Schedule) -> Tensor:
    """Sample from q(z_t | z_0): sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise (DDPM eq. 4)."""
    alpha_bar_B1 = schedule.alpha_bar[t_B, None]
    return alpha_bar_B1.sqrt() * z0_BD + (1 - alpha_bar_B1).sqrt() * noise_BD


def q_posterior(
    z0_BD: Tensor, zt_BD: Tensor, t_B: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Return the mean [B, D] and variance [B, 1] of q(z_(t-1) | z_t, z_0) (DDPM eq. 7)."""
    alpha_bar_B1, previous_B1 = schedule.alpha_bar[t_B, None], schedule.previous[t_B, None]
    beta_B1 = 1 - alpha_bar_B1 / previous_B1
    from_z0_BD = previous_B1.sqrt() * beta_B1 * z0_BD
    from_zt_BD = (alpha_bar_B1 / previous_B1).sqrt() * (1 - previous_B1) * zt_BD
    mean_BD = (from_z0_BD + from_zt_BD) / (1 - alpha_bar_B1)
    return mean_BD, beta_B1 * (1 - previous_B1) / (1 - alpha_bar_B1)


def p_sample(
    denoise: Denoise, zt_BD: Tensor, t_B: Tensor, schedule: Schedule, noise_BD: Tensor
) -> Tensor:
    """Take one ancestral reverse step z_t -> z_(t-1). Zero noise gives the posterior mean."""
    mean_BD, variance_B1 = q_posterior(denoise(zt_BD, t_B), zt_BD, t_B, schedule)
    return mean_BD + variance_B1.sqrt() * noise_BD


def reverse_levels(
    denoise: Denoise, zt_BD: Tensor, levels: tuple[int, ...], schedule: Schedule
) -> Tensor:
    """Run one deterministic reverse chain and return its prediction of z_0 at every noise level.

    The chain goes down the levels with DDIM steps (Song et al. 2021, eq. 12, sigma = 0) and calls
    the denoiser once per level. A prediction from a noisy level knows only the condition; one from
    a clean level resembles the positive.

    Args:
        zt_BD: z_t at the noisiest level.
        levels: ascending, in 1 .. T; level l is t = l - 1.

    Returns:
        The predictions [L, B, D], the noisiest level first.
    """
    predictions = []
    descending = levels[::-1]
    for level, following in zip(descending, (*descending[1:], 0), strict=True):
        t_B = torch.full((len(zt_BD),), level - 1, device=zt_BD.device)
        z0_BD = denoise(zt_BD, t_B)
        predictions.append(z0_BD)
        if following:
            noise_BD = predicted_noise(z0_BD, zt_BD, t_B, schedule)
            zt_BD = q_sample(z0_BD, torch.full_like(t_B, following - 1), noise_BD, schedule)
    return torch.stack(predictions)


def predicted_noise(z0_BD: Tensor, zt_BD: Tensor, t_B: Tensor, schedule: Schedule) -> Tensor:
    """Return the noise with which :func:`q_sample` turns z_0 into z_t."""
    alpha_bar_B1 = schedule.alpha_bar[t_B, None]
    return (zt_BD - alpha_bar_B1.sqrt() * z0_BD) / (1 - alpha_bar_B1).sqrt()
