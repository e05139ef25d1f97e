"""The diffusion functions against closed forms (Ho et al. 2020; Song et al. 2021)."""

import math

import pytest
import torch

from cnsdiff_dist.models.diffusion import (
    Schedule,
    make_schedule,
    p_sample,
    predicted_noise,
    q_posterior,
    q_sample,
    reverse_levels,
)

SCHEDULES = ["cosine", "linear", "linear-var"]


def _double(schedule: Schedule) -> Schedule:
    return Schedule(schedule.alpha_bar.double(), schedule.previous.double())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_alpha_bar_falls_and_previous_is_its_shift(kind: str) -> None:
    schedule = make_schedule(kind, 20)
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.previous[0] == 1
    assert torch.equal(schedule.previous[1:], schedule.alpha_bar[:-1])


def test_real_schedules_reach_noise_and_the_published_one_does_not() -> None:
    assert make_schedule("cosine", 20).alpha_bar[-1] < 0.05
    assert make_schedule("linear", 20).alpha_bar[-1] < 0.05
    assert make_schedule("linear-var", 20).alpha_bar[-1] == pytest.approx(0.998, abs=1e-4)


def test_published_schedule_values() -> None:
    published = make_schedule("linear-var", 20)
    expected = [1 - (1e-5 + (2e-3 - 1e-5) * t / 19) for t in range(20)]
    assert published.alpha_bar.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_q_sample_has_the_moments_of_the_forward_process(kind: str) -> None:
    schedule = make_schedule(kind, 20)
    z0 = torch.full((200_000, 1), 1.5)
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    for t in (0, 7, 19):
        zt = q_sample(z0, torch.full((len(z0),), t), noise, schedule)
        alpha_bar = float(schedule.alpha_bar[t])
        assert zt.mean().item() == pytest.approx(1.5 * math.sqrt(alpha_bar), abs=0.01)
        assert zt.var().item() == pytest.approx(1 - alpha_bar, abs=0.01)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_posterior_is_the_product_of_its_two_gaussians(kind: str) -> None:
    """Bayes: N(z_t; sqrt(a) z_(t-1), beta) x N(z_(t-1); sqrt(ab') z_0, 1 - ab')."""
    schedule = _double(make_schedule(kind, 20))
    z0, zt = torch.randn(20, 4).double(), torch.randn(20, 4).double()
    t = torch.arange(20)
    mean, variance = q_posterior(z0, zt, t, schedule)
    for step in range(1, 20):
        alpha_bar, before = float(schedule.alpha_bar[step]), float(schedule.alpha_bar[step - 1])
        alpha, beta = alpha_bar / before, 1 - alpha_bar / before
        precision = alpha / beta + 1 / (1 - before)
        expected = math.sqrt(alpha) * zt[step] / beta + math.sqrt(before) * z0[step] / (1 - before)
        assert variance[step].item() == pytest.approx(1 / precision, rel=1e-6)
        assert torch.allclose(mean[step], expected / precision)
    assert torch.allclose(mean[0], z0[0]) and variance[0] == 0


def test_p_sample_without_noise_is_the_posterior_mean_and_with_noise_has_its_spread() -> None:
    schedule = make_schedule("cosine", 20)
    z0, zt, t = torch.randn(50_000, 2), torch.randn(50_000, 2), torch.full((50_000,), 9)
    mean, variance = q_posterior(z0, zt, t, schedule)
    zero = torch.zeros_like(zt)
    assert torch.equal(p_sample(lambda *_: z0, zt, t, schedule, zero), mean)
    spread = p_sample(lambda *_: z0, zt, t, schedule, torch.randn_like(zt)) - mean
    assert spread.var().item() == pytest.approx(variance[0].item(), rel=0.05)


def test_an_ancestral_chain_with_a_perfect_denoiser_ends_at_z0() -> None:
    schedule = make_schedule("cosine", 20)
    z0, zt = torch.randn(8, 4), torch.randn(8, 4)
    for t in reversed(range(20)):
        zt = p_sample(lambda *_: z0, zt, torch.full((8,), t), schedule, torch.zeros(8, 4))
    assert torch.allclose(zt, z0, atol=1e-5)


def test_predicted_noise_inverts_q_sample() -> None:
    schedule = _double(make_schedule("cosine", 20))
    z0, noise, t = torch.randn(20, 4).double(), torch.randn(20, 4).double(), torch.arange(20)
    zt = q_sample(z0, t, noise, schedule)
    assert torch.allclose(predicted_noise(z0, zt, t, schedule), noise)


def test_reverse_levels_follows_ddim_in_closed_form() -> None:
    """With f(z, t) = c z every latent of the chain is a known multiple of the first."""
    schedule = _double(make_schedule("cosine", 20))
    levels, c, seen = (4, 10, 18), 0.5, []

    def denoise(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(int(t[0]))
        return c * zt

    start = torch.randn(3, 4).double()
    out = reverse_levels(denoise, start, levels, schedule)
    assert seen == [17, 9, 3]  # one call per level, the noisiest first
    factor = 1.0
    for index, level in enumerate(reversed(levels)):
        assert torch.allclose(out[index], c * factor * start)
        if index < 2:
            here = float(schedule.alpha_bar[level - 1])
            below = float(schedule.alpha_bar[levels[1 - index] - 1])
            noise = (1 - math.sqrt(here) * c) / math.sqrt(1 - here)
            factor *= math.sqrt(below) * c + math.sqrt(1 - below) * noise


def test_reverse_levels_is_deterministic_and_keeps_a_perfect_prediction() -> None:
    schedule, z0 = make_schedule("cosine", 20), torch.randn(8, 4)
    zt = q_sample(z0, torch.full((8,), 17), torch.randn(8, 4), schedule)
    out = reverse_levels(lambda *_: z0, zt, (10, 14, 18), schedule)
    assert out.shape == (3, 8, 4)
    assert all(torch.equal(candidate, z0) for candidate in out)
