"""Gaussian diffusion in latent space: small pure functions, noise is an argument.

Time runs over t = 0..T-1 (Ho et al., "Denoising Diffusion Probabilistic Models", 2020,
counts 1..T); ``alpha_bar[t]`` is the signal kept at t, and t = T-1 is the noisiest.

Shapes: B batch, D latent dim, T steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(z_t [B, D], t int64 [B]) -> predicted z_0 [B, D]."""


@dataclass(frozen=True)
class Schedule:
    """Coefficients per t, each float32 [T]; ``previous`` is alpha_bar[t - 1], 1 at t = 0."""

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
    """``cosine`` (Nichol and Dhariwal 2021, eq. 17), ``linear`` or ``linear-var``.

    ``cosine`` and ``linear`` end in real noise (alpha_bar[T-1] below 0.05). ``linear-var``
    is the published CNSDiff schedule (scale 0.1, min 1e-4, max 0.02), whose alpha_bar
    ends at 0.998: kept for comparison only.
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
    """z_t ~ q(z_t | z_0) = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise (DDPM eq. 4)."""
    alpha_bar = schedule.alpha_bar[t_B, None]
    return alpha_bar.sqrt() * z0_BD + (1 - alpha_bar).sqrt() * noise_BD


def q_posterior(
    z0_BD: Tensor, zt_BD: Tensor, t_B: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor]:
    """Mean [B, D] and variance [B, 1] of q(z_(t-1) | z_t, z_0) (DDPM eq. 7)."""
    alpha_bar, previous = schedule.alpha_bar[t_B, None], schedule.previous[t_B, None]
    beta = 1 - alpha_bar / previous
    mean_BD = (
        previous.sqrt() * beta * z0_BD + (alpha_bar / previous).sqrt() * (1 - previous) * zt_BD
    ) / (1 - alpha_bar)
    return mean_BD, beta * (1 - previous) / (1 - alpha_bar)


def p_sample(
    denoise: Denoise, zt_BD: Tensor, t_B: Tensor, schedule: Schedule, noise_BD: Tensor
) -> Tensor:
    """One ancestral reverse step z_t -> z_(t-1); zero noise gives the posterior mean."""
    mean_BD, variance = q_posterior(denoise(zt_BD, t_B), zt_BD, t_B, schedule)
    return mean_BD + variance.sqrt() * noise_BD


def reverse_levels(
    denoise: Denoise, zt_BD: Tensor, levels: tuple[int, ...], schedule: Schedule
) -> Tensor:
    """One deterministic reverse chain that yields a candidate at every noise level.

    Starts from z_t at the noisiest of ``levels`` (ascending, 1..T; level l is t = l - 1)
    and walks down them with DDIM steps (Song et al. 2021, eq. 12, sigma = 0). The
    prediction of z_0 at each level is that level's candidate: noisy levels know only the
    condition, clean ones resemble the positive. One denoiser call per level.

    Returns:
        [len(levels), B, D], the noisiest first.
    """
    candidates = []
    descending = levels[::-1]
    for level, following in zip(descending, (*descending[1:], 0), strict=True):
        t_B = torch.full((len(zt_BD),), level - 1, device=zt_BD.device)
        z0_BD = denoise(zt_BD, t_B)
        candidates.append(z0_BD)
        if following:
            noise_BD = predicted_noise(z0_BD, zt_BD, t_B, schedule)
            zt_BD = q_sample(z0_BD, torch.full_like(t_B, following - 1), noise_BD, schedule)
    return torch.stack(candidates)


def predicted_noise(z0_BD: Tensor, zt_BD: Tensor, t_B: Tensor, schedule: Schedule) -> Tensor:
    """The noise that q_sample would need to turn z_0 into z_t."""
    alpha_bar = schedule.alpha_bar[t_B, None]
    return (zt_BD - alpha_bar.sqrt() * z0_BD) / (1 - alpha_bar).sqrt()
