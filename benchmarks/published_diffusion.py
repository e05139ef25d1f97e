"""The diffusion of the published CNSDiff code: benchmarks/published.py says how it was written.

B rows, D dimensions.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS, SCALE, LOWEST, HIGHEST = 20, 0.1, 1e-4, 0.02
CAUSAL = 0.1

Floats = npt.NDArray[np.float64]


class GaussianDiffusion:
    """Forward and backward process on vectors, schedule "linear-var", in float64 arrays."""

    def __init__(self) -> None:
        alpha_bar = 1.0 - np.linspace(SCALE * LOWEST, SCALE * HIGHEST, STEPS, dtype=np.float64)
        before = np.append(1.0, alpha_bar[:-1])
        alpha = alpha_bar / before
        variance = (1.0 - alpha) * (1.0 - before) / (1.0 - alpha_bar)
        self.signal = np.sqrt(alpha_bar)
        self.noise = np.sqrt(1.0 - alpha_bar)
        self.snr = alpha_bar / (1.0 - alpha_bar)
        # variance is 0 at t = 0: its logarithm is taken of the next one there.
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.of_start = (1.0 - alpha) * np.sqrt(before) / (1.0 - alpha_bar)
        self.of_noisy = (1.0 - before) * np.sqrt(alpha) / (1.0 - alpha_bar)

    def q_sample(self, start_BD: Tensor, t_B: Tensor, noise_BD: Tensor) -> Tensor:
        signal_BD = expand(self.signal, t_B, start_BD.shape)
        return signal_BD * start_BD + expand(self.noise, t_B, start_BD.shape) * noise_BD

    def posterior_mean(self, start_BD: Tensor, noisy_BD: Tensor, t_B: Tensor) -> Tensor:
        of_start_BD = expand(self.of_start, t_B, start_BD.shape)
        return of_start_BD * start_BD + expand(self.of_noisy, t_B, start_BD.shape) * noisy_BD

    def loss(self, denoiser: nn.Module, start_BD: Tensor) -> Tensor:
        """SNR-weighted error of the predicted start, plus the "causal" KL term."""
        t_B = torch.randint(0, STEPS, (len(start_BD),))
        before_B = (t_B - 1).clamp(min=0)
        noise_BD = torch.randn_like(start_BD)
        noisy_BD = self.q_sample(start_BD, t_B, noise_BD)
        cleaner_BD = self.q_sample(start_BD, before_B, noise_BD)
        guess_BD = denoiser(noisy_BD, t_B)

        error_B = ((start_BD - guess_BD) ** 2).mean(dim=1)
        snr_B = expand(self.snr, before_B, t_B.shape) - expand(self.snr, t_B, t_B.shape)
        weight_B = torch.where(t_B == 0, 1.0, snr_B)
        log_variance_BD = expand(self.log_variance, t_B, start_BD.shape)
        cleaner_log_variance_BD = expand(self.log_variance, before_B, start_BD.shape)
        cleaner_log_variance_BD = torch.where(t_B[:, None] == 0, 0.0, cleaner_log_variance_BD)
        kl_BD = gaussian_kl(guess_BD, log_variance_BD, cleaner_BD, cleaner_log_variance_BD)
        return (weight_B * error_B).mean() + CAUSAL * kl_BD.mean()

    def generate(self, denoiser: nn.Module, start_BD: Tensor, level: int) -> Tensor:
        """Noise to ``level``, then denoise from T whatever the level was."""
        level_B = torch.tensor([level - 1] * len(start_BD))
        x_BD = self.q_sample(start_BD, level_B, torch.randn_like(start_BD))
        for t in reversed(range(STEPS)):
            t_B = torch.tensor([t] * len(start_BD))
            x_BD = self.posterior_mean(denoiser(x_BD, t_B), x_BD, t_B)
        return x_BD


def expand(values: Floats, t_B: Tensor, shape: torch.Size) -> Tensor:
    """values[t] in float32, repeated to ``shape``."""
    picked = torch.from_numpy(values)[t_B].float()
    while picked.dim() < len(shape):
        picked = picked.unsqueeze(-1)
    return picked.expand(shape)


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(mean_2, exp(log_variance_2))), element-wise."""
    ratio = torch.exp(log_variance - log_variance_2)
    distance = (mean - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance + ratio + distance - 1.0)


class Denoiser(nn.Module):
    """An MLP of (x_t, t); its dropout is on in training and in sampling alike."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.time = nn.Linear(dim, dim)
        self.first = nn.Linear(2 * dim, hidden)
        self.last = nn.Linear(hidden, dim)

    def forward(self, x_BD: Tensor, t_B: Tensor) -> Tensor:
        time_BD = self.time(self.sinusoid(t_B))
        x_BD = functional.dropout(functional.normalize(x_BD), 0.5, training=True)
        return self.last(torch.tanh(self.first(torch.cat([x_BD, time_BD], dim=-1))))

    def sinusoid(self, t_B: Tensor) -> Tensor:
        half = self.dim // 2
        rates = torch.exp(-math.log(10_000.0) * torch.arange(half) / half)
        angles = t_B[:, None].float() * rates[None]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)
