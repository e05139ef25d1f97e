"""The terms of the objective, each one value per row; the trainer weights and sums them.

Shapes: B rows, D embedding dim, G rows of a canonical stream in a step (B = groups x G).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cnsdiff_dist.models.diffusion import Denoise, Schedule, q_sample


def bpr(positive_B: Tensor, negative_BN: Tensor) -> Tensor:
    """-log sigmoid(s_pos - s_neg), a mean over a row's negatives, [B] (Rendle et al., UAI 2009).

    A logit of -inf leaves a negative out; a row without any has loss 0.
    """
    loss_BN = functional.softplus(negative_BN - positive_B[:, None])  # softplus(-inf) is 0
    return loss_BN.sum(1) / (negative_BN > -torch.inf).sum(1).clamp(min=1)


def sampled_softmax(positive_B: Tensor, negative_BN: Tensor) -> Tensor:
    """-log(e^pos / (e^pos + sum e^neg)), [B] (Bengio & Senécal, AISTATS 2003).

    A logit of -inf leaves a negative out.
    """
    loss_B: Tensor = _SampledSoftmax.apply(positive_B, negative_BN)  # type: ignore[no-untyped-call]
    return loss_B


class _SampledSoftmax(torch.autograd.Function):
    """Its own gradient, so that each exponential is taken once: d loss / d s_j is the softmax's
    p_j, which is finite also where no negative is left."""

    @staticmethod
    def forward(ctx: Any, positive_B: Tensor, negative_BN: Tensor) -> Tensor:
        top_B = torch.maximum(positive_B, negative_BN.amax(1))
        # exp of -inf takes a slow path on CPUs, 17 times exp2's.
        part_BN = (negative_BN - top_B[:, None]).mul_(math.log2(math.e)).exp2_()
        own_B = (positive_B - top_B).exp()
        mass_B = part_BN.sum(1) + own_B
        ctx.save_for_backward(part_BN, own_B, mass_B)
        return mass_B.log() + top_B - positive_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, Tensor]:
        part_BN, own_B, mass_B = ctx.saved_tensors
        scale_B = grad_B / mass_B
        return own_B * scale_B - grad_B, part_BN * scale_B[:, None]


def l2(*rows_BD: Tensor) -> Tensor:
    """Half the squared norm of the table rows a batch row uses, [B]."""
    return torch.stack([rows.square().sum(1) for rows in rows_BD]).sum(0) / 2


def info_nce(
    anchor_BD: Tensor,
    positive_BD: Tensor,
    negatives: list[Tensor],
    weight_B: Tensor,
    groups: int,
    temperature: float,
) -> Tensor:
    """-log(e^pos / (e^pos + sum e^neg)) on cosines over a temperature, [B].

    Oord et al. 2018, with the positive inside the denominator. The negatives of a row are
    those of its group (one canonical stream's rows of this step), so that neither the world
    size nor the batch changes a row's pool; rows of weight 0 (pads) are in no pool.
    """
    anchor, positive = functional.normalize(anchor_BD), functional.normalize(positive_BD)
    pool = [functional.normalize(rows).unflatten(0, (groups, -1)) for rows in negatives]
    cosine = torch.bmm(
        (anchor / temperature).unflatten(0, (groups, -1)), torch.cat(pool, 1).transpose(1, 2)
    )
    # Cosines over a temperature are bounded, so exp needs no shift by the maximum.
    present = (weight_B > 0).to(cosine).view(groups, -1, 1).repeat(1, len(pool), 1)
    mass_B = torch.bmm(cosine.exp(), present).flatten()
    logit_B = (anchor * positive).sum(1) / temperature
    return torch.log(mass_B + logit_B.exp()) - logit_B


def snr_weights(schedule: Schedule, clip: float) -> Tensor:
    """SNR(t-1) - SNR(t), 1 at t = 0, at most ``clip``: float32 [T].

    Kingma et al. 2021, eq. 17, with the bound of Hang et al. 2023 ("min-SNR").
    """
    snr = schedule.snr
    return torch.cat([torch.ones_like(snr[:1]), snr[:-1] - snr[1:]]).clamp(max=clip)


def diffusion(
    denoise: Denoise,
    z0_BD: Tensor,
    t_B: Tensor,
    noise_BD: Tensor,
    schedule: Schedule,
    clip: float,
    causal: float,
) -> tuple[Tensor, Tensor]:
    """SNR-weighted MSE + ``causal`` x KL (CNSDiff, arXiv 2508.07243), and the plain MSE.

    Returns:
        loss [B], and the unweighted squared error per dimension [B], detached: on
        standardised latents 1.0 is what predicting the mean would score.
    """
    prediction_BD = denoise(q_sample(z0_BD, t_B, noise_BD, schedule), t_B)
    error_B = (prediction_BD - z0_BD).square().mean(1)
    loss_B = snr_weights(schedule, clip)[t_B] * error_B
    if causal:
        loss_B = loss_B + causal * causal_kl(error_B, t_B, schedule)
    return loss_B, error_B.detach()


def causal_kl(error_B: Tensor, t_B: Tensor, schedule: Schedule) -> Tensor:
    """KL(N(m, s_t^2) || N(z_(t-1), s_(t-1)^2)) per dimension, [B]; 0 at t = 0.

    z_(t-1) is the forward sample with the noise of z_t, and m the latent at t - 1 that the
    prediction f of z_0 implies (the DDIM step from z_t). Both are linear in z_0 and f, so
    m - z_(t-1) = k_t (f - z_0), and ``error_B``, the squared error of f per dimension, is all
    it takes. The published code puts f itself in the place of m, which teaches the denoiser
    to predict z_(t-1), noise included. s_t^2 is the variance of ``q_posterior``, at t = 0
    replaced by that of t = 1.
    """
    alpha_bar, previous = schedule.alpha_bar, schedule.previous
    gain = previous.sqrt() - ((1 - previous) * alpha_bar / (1 - alpha_bar)).sqrt()
    variance = schedule.beta * (1 - previous) / (1 - alpha_bar)
    variance = torch.cat([variance[1:2], variance[1:]])
    here, before = variance[t_B], variance[(t_B - 1).clamp(min=0)]
    kl_B = 0.5 * (torch.log(before / here) + (here + gain[t_B] ** 2 * error_B) / before - 1)
    return torch.where(t_B > 0, kl_B, torch.zeros_like(kl_B))
