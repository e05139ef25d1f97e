"""Each loss term against its formula, written row by row in plain Python."""

import math

import pytest
import torch

from cnsdiff_dist.models import losses
from cnsdiff_dist.models.diffusion import make_schedule

B, D = 12, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_l2_is_half_the_squared_norm() -> None:
    rows = torch.randn(2, B, D)
    expected = [
        sum(x.item() ** 2 for x in torch.cat([a, b])) / 2 for a, b in zip(*rows, strict=True)
    ]
    assert losses.l2(*rows).tolist() == pytest.approx(expected, rel=1e-5)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def test_info_nce_has_its_groups_pool_its_positive_and_no_pads() -> None:
    anchor, positive, hard, random = torch.randn(4, B, D)
    weight = torch.ones(B)
    weight[5], weight[11] = 0, 0
    groups, width, temperature = 2, 6, 0.7
    got = losses.info_nce(anchor, positive, [hard, random], weight, groups, temperature)
    for row in range(B):
        pool = [r for r in range(B) if r // width == row // width and weight[r] > 0]
        negatives = [
            math.exp(_cosine(anchor[row], other[r]) / temperature)
            for other in (hard, random)
            for r in pool
        ]
        own = math.exp(_cosine(anchor[row], positive[row]) / temperature)
        assert got[row].item() == pytest.approx(-math.log(own / (own + sum(negatives))), rel=1e-4)


def test_snr_weights_are_differences_one_at_zero_and_bounded() -> None:
    schedule = make_schedule("cosine", 20)
    weights = losses.snr_weights(schedule, clip=5.0)
    snr = [a / (1 - a) for a in schedule.alpha_bar.tolist()]
    expected = [1.0] + [min(snr[t - 1] - snr[t], 5.0) for t in range(1, 20)]
    assert weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert weights.max() <= 5 and weights.min() > 0


def test_the_published_weights_explode_without_the_bound() -> None:
    weights = losses.snr_weights(make_schedule("linear-var", 20), clip=1e9)
    assert weights[0] == 1 and weights[1] > 80_000


def test_diffusion_is_weighted_mse_plus_kl() -> None:
    schedule, causal, clip = make_schedule("cosine", 20), 0.3, 5.0
    z0, noise, prediction = torch.randn(3, 20, D)
    t = torch.arange(20)
    loss, error = losses.diffusion(lambda *_: prediction, z0, t, noise, schedule, clip, causal)
    alpha_bar = schedule.alpha_bar.double().tolist()

    def variance(step: int) -> float:  # of q(z_(t-1) | z_t, z_0), DDPM eq. 7
        step = max(step, 1)
        beta = 1 - alpha_bar[step] / alpha_bar[step - 1]
        return beta * (1 - alpha_bar[step - 1]) / (1 - alpha_bar[step])

    for step in range(20):
        mse = (
            sum(
                (f - z) ** 2
                for f, z in zip(prediction[step].tolist(), z0[step].tolist(), strict=True)
            )
            / D
        )
        weight = 1.0
        kl = 0.0
        if step:
            snr = [a / (1 - a) for a in alpha_bar]
            weight = min(snr[step - 1] - snr[step], clip)
            a = alpha_bar[step - 1]
            target = [
                math.sqrt(a) * z + math.sqrt(1 - a) * e
                for z, e in zip(z0[step].tolist(), noise[step].tolist(), strict=True)
            ]
            p, q = variance(step), variance(step - 1)
            here = math.sqrt(alpha_bar[step]), math.sqrt(1 - alpha_bar[step])
            noisy = [
                here[0] * z + here[1] * e
                for z, e in zip(z0[step].tolist(), noise[step].tolist(), strict=True)
            ]
            means = [
                math.sqrt(a) * f + math.sqrt(1 - a) * (zt - here[0] * f) / here[1]
                for f, zt in zip(prediction[step].tolist(), noisy, strict=True)
            ]
            kl = (
                sum(
                    math.log(math.sqrt(q) / math.sqrt(p)) + (p + (f - m) ** 2) / (2 * q) - 0.5
                    for f, m in zip(means, target, strict=True)
                )
                / D
            )
        assert error[step].item() == pytest.approx(mse, rel=1e-4)
        assert loss[step].item() == pytest.approx(weight * mse + causal * kl, rel=2e-3)


def test_predicting_the_mean_of_standard_latents_scores_one() -> None:
    schedule = make_schedule("cosine", 20)
    z0, noise = torch.randn(2, 50_000, 2)
    t = torch.randint(20, (50_000,))
    _, error = losses.diffusion(
        lambda zt, _: torch.zeros_like(zt), z0, t, noise, schedule, 5.0, 0.0
    )
    assert error.mean().item() == pytest.approx(1.0, abs=0.02)


def test_the_causal_term_is_least_at_the_true_latent() -> None:
    schedule, t = make_schedule("cosine", 20), torch.arange(20)
    kl = [losses.causal_kl(torch.full((20,), error), t, schedule) for error in (0.0, 0.1, 1.0)]
    assert (kl[0][1:] < kl[1][1:]).all() and (kl[1][1:] < kl[2][1:]).all()
    assert all(values[0] == 0 for values in kl)
