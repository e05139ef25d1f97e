"""Loss terms, each with one value per row. The training step weights and sums them.

Shapes: B rows of the batch, in G groups of W rows (a group is the rows of one canonical stream in a
step, so B = G x W); P vectors in a group's pool; D embedding dimension; T diffusion steps.
"""

import torch
from torch import Tensor
from torch.nn import functional

from cnsdiff_dist.models.diffusion import Denoise, Schedule, q_sample


def l2(*rows_BD: Tensor) -> Tensor:
    """Return half the squared norm of the table rows that a row of the batch uses, [B]."""
    return torch.stack([rows.square().sum(1) for rows in rows_BD]).sum(0) / 2


def info_nce(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negatives: list[Tensor],
    weight_B: Tensor,
    groups: int,
    temperature: float,
) -> Tensor:
    """Return InfoNCE: -log(e^pos / (e^pos + sum e^neg)) on cosines over a temperature, [B].

    Oord et al. 2018, with the positive inside the denominator. A row's pool is the negatives of
    its group, so it depends neither on the world size nor on the batch.

    Args:
        negatives: tensors [B, D], each with one negative of every row.
        weight_B: 0 for pads, whose negatives are in no pool.
        groups: G.
    """
    anchor_BD, positive_BD = functional.normalize(anchor_BD), functional.normalize(positive_BD)
    by_group = (groups, -1)
    parts = [functional.normalize(rows_BD).unflatten(0, by_group) for rows_BD in negatives]
    pool_GPD = torch.cat(parts, 1)
    anchor_GWD = (anchor_BD / temperature).unflatten(0, by_group)
    logit_GWP = torch.bmm(anchor_GWD, pool_GPD.transpose(1, 2))
    # Cosines over a temperature are bounded, so exp needs no shift by the maximum.
    present_GP1 = (weight_B > 0).to(logit_GWP).view(groups, -1, 1).repeat(1, len(parts), 1)
    mass_B = torch.bmm(logit_GWP.exp(), present_GP1).flatten()
    logit_B = (anchor_BD * positive_BD).sum(1) / temperature
    return torch.log(mass_B + logit_B.exp()) - logit_B


def snr_weights(schedule: Schedule, clip: float) -> Tensor:
    """Return the weights SNR(t - 1) - SNR(t), at most ``clip``, and 1 at t = 0: float32 [T].

    Kingma et al. 2021, eq. 17, with the bound of Hang et al. 2023 ("min-SNR").
    """
    snr_T = schedule.snr
    return torch.cat([torch.ones_like(snr_T[:1]), snr_T[:-1] - snr_T[1:]]).clamp(max=clip)


def diffusion(
    denoise: Denoise,
    z0_BD: Tensor,
    t_B: Tensor,
    noise_BD: Tensor,
    schedule: Schedule,
    clip: float,
    causal: float,
) -> tuple[Tensor, Tensor]:
    """Return CNSDiff's diffusion loss (arXiv 2508.07243), and the plain error of the prediction.

    Args:
        clip: the bound of :func:`snr_weights`.
        causal: the weight of :func:`causal_kl`.

    Returns:
        The loss [B]: the squared error weighted by SNR, plus ``causal`` times the KL. And the
        unweighted squared error per dimension [B], detached; on standardised latents it is 1.0
        for a denoiser that predicts the mean.
    """
    prediction_BD = denoise(q_sample(z0_BD, t_B, noise_BD, schedule), t_B)
    error_B = (prediction_BD - z0_BD).square().mean(1)
    loss_B = snr_weights(schedule, clip)[t_B] * error_B
    if causal:
        loss_B = loss_B + causal * causal_kl(error_B, t_B, schedule)
    return loss_B, error_B.detach()


def causal_kl(error_B: Tensor, t_B: Tensor, schedule: Schedule) -> Tensor:
    """Return KL(N(m, s_t^2) || N(z_(t-1), s_(t-1)^2)) per dimension, [B]; 0 at t = 0.

    z_(t-1) is the forward sample with the noise of z_t. m is the latent at t - 1 that the
    prediction f of z_0 implies, by the DDIM step from z_t. Both are linear in z_0 and f, so
    m - z_(t-1) = k_t (f - z_0), and the squared error of f suffices to compute the KL. s_t^2 is
    the variance of ``q_posterior``; that of t = 0 is replaced by that of t = 1.

    The published code puts f itself in the place of m, which teaches the denoiser to predict
    z_(t-1), noise included.

    Args:
        error_B: the squared error of f per dimension.
    """
    alpha_bar_T, previous_T = schedule.alpha_bar, schedule.previous
    gain_T = previous_T.sqrt() - ((1 - previous_T) * alpha_bar_T / (1 - alpha_bar_T)).sqrt()
    variance_T = schedule.beta * (1 - previous_T) / (1 - alpha_bar_T)
    variance_T = torch.cat([variance_T[1:2], variance_T[1:]])
    here_B, before_B = variance_T[t_B], variance_T[(t_B - 1).clamp(min=0)]
    gap_B = gain_T[t_B] ** 2 * error_B
    kl_B = 0.5 * (torch.log(before_B / here_B) + (here_B + gap_B) / before_B - 1)
    return torch.where(t_B > 0, kl_B, torch.zeros_like(kl_B))
