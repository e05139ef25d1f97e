"""The baseline of the speed claim runs, learns and evaluates right."""

import numpy as np
import pytest
import torch

from benchmarks import published

USERS, ITEMS, DIM = 40, 60, 16


@pytest.fixture
def pairs() -> tuple[published.Ints, published.Ints]:
    rng = np.random.default_rng(0)
    chosen = rng.choice(USERS * ITEMS, size=500, replace=False)
    return chosen // ITEMS, chosen % ITEMS


@pytest.fixture
def trainer(pairs: tuple[published.Ints, published.Ints]) -> published.PublishedStep:
    sets = published.to_sets(*pairs, USERS)
    return published.PublishedStep(sets, USERS, ITEMS, dim=DIM, seed=1)


def test_bpr_falls_and_every_part_is_timed(trainer, pairs):
    trainer.step(*pairs)
    first = trainer.losses["bpr"]
    for _ in range(100):
        total = trainer.step(*pairs)
    assert trainer.losses["bpr"] < 0.9 * first
    assert np.isfinite(total)
    assert all(trainer.parts[name] > 0 for name in published.PARTS)


def test_shapes_and_sampled_negatives(trainer, pairs):
    users_UD, items_ID = trainer.encode()
    assert users_UD.shape == (USERS, DIM)
    assert items_ID.shape == (ITEMS, DIM)
    hard_BD = trainer.hardest(users_UD[:8], items_ID[:8])
    assert hard_BD.shape == (8, DIM)
    negative = trainer.sample(pairs[0]).tolist()
    assert all(
        item not in trainer.user_items[user]
        for user, item in zip(pairs[0].tolist(), negative, strict=True)
    )


def test_the_denoiser_is_never_stepped(trainer, pairs):
    before = [parameter.clone() for parameter in trainer.denoiser.parameters()]
    trainer.step(*pairs)
    for old, new in zip(before, trainer.denoiser.parameters(), strict=True):
        assert torch.equal(old, new)


def test_schedule_follows_its_formulas():
    diffusion = published.GaussianDiffusion()
    assert diffusion.snr[0] == pytest.approx((1 - 1e-5) / 1e-5)
    assert diffusion.signal[-1] ** 2 == pytest.approx(0.998)
    # At t = 0 the posterior mean is the predicted start itself.
    assert diffusion.of_start[0] == pytest.approx(1)
    assert diffusion.of_noisy[0] == 0


def test_evaluation_agrees_with_a_dense_one(pairs):
    generator = torch.Generator().manual_seed(0)
    user_UD = torch.randn(USERS, DIM, generator=generator)
    item_ID = torch.randn(ITEMS, DIM, generator=generator)
    train = published.to_csr(pairs[0][:400], pairs[1][:400], USERS)
    test = published.to_csr(pairs[0][400:], pairs[1][400:], USERS)
    scores_UI = user_UD @ item_ID.T
    scores_UI[pairs[0][:400], pairs[1][:400]] = -torch.inf
    hits_UK = torch.zeros(USERS, ITEMS)
    hits_UK[pairs[0][400:], pairs[1][400:]] = 1
    count_U = hits_UK.sum(dim=1)
    found_U = hits_UK.gather(1, scores_UI.topk(5).indices).sum(dim=1)
    expected = (found_U / count_U)[count_U > 0].mean().item()
    assert published.published_evaluation(user_UD, item_ID, train, test, 5) == pytest.approx(
        expected
    )
