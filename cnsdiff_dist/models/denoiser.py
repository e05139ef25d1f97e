"""The denoiser: an MLP without dropout that predicts z_0 from (z_t, t, condition).

Shapes: B rows of the batch, D dimension of a latent, T diffusion steps.
"""

import math

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """Predicts z_0 on standardised latents: f(z_t, t, c) -> z_0.

    Args:
        dim: D.
        steps: T.
        hidden: the width of the two hidden layers.
        environments: the number of environments; 0 leaves the environment out of the condition.
        user: whether the condition has the user's latent.
    """

    def __init__(self, dim: int, steps: int, hidden: int, environments: int, user: bool) -> None:
        super().__init__()
        self.register_buffer("time_table", sinusoids(steps, dim), persistent=False)
        self.environment = nn.Embedding(environments, dim) if environments else None
        self.user = nn.Linear(dim, dim, bias=False) if user else None
        self.body = nn.Sequential(
            nn.Linear(2 * dim + (dim if user else 0), hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, zt_BD: Tensor, t_B: Tensor, user_BD: Tensor, environment_B: Tensor) -> Tensor:
        """Return the prediction [B, D] in the dtype of ``zt_BD``.

        ``t_B`` and ``environment_B`` are int64.
        """
        dtype = next(self.body.parameters()).dtype
        code_BD = self.get_buffer("time_table")[t_B].to(dtype)
        if self.environment is not None:
            code_BD = code_BD + self.environment(environment_B)
        parts = [zt_BD.to(dtype), code_BD]
        if self.user is not None:
            parts.append(self.user(user_BD.to(dtype)))
        return self.body(torch.cat(parts, dim=1)).to(zt_BD.dtype)


def sinusoids(steps: int, dim: int) -> Tensor:
    """Return the Transformer's position codes of t = 0 .. T - 1, float32 [T, D].

    Vaswani et al., "Attention Is All You Need", 2017.
    """
    rate = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    angle = torch.arange(steps)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)[:, :dim]
