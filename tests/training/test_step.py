"""One training step: which rows it moves, what it minimises, what it draws."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.distributed.world import World
from tests.support.small import small_config
from tests.support.tables import gather
from tests.support.trainers import new_trainer


@pytest.mark.parametrize("kind", ["uniform", "cnsdiff"])
def test_bpr_alone_reaches_the_rows_of_its_batch(
    dataset: str, tmp_path: Path, world: World, kind: str
) -> None:
    config = small_config(
        dataset,
        tmp_path,
        negatives={"kind": kind},
        model={"layers": 0},
        loss={"contrastive": 0.0, "diffusion": 0.0, "l2": 0.0},
    )
    trainer = new_trainer(config, world)
    before = {
        name: gather(t, world) for name, t in trainer.step.recommender.tables.weights().items()
    }
    batch = next(iter(trainer.stream.batches(0)))
    trainer.take_step(trainer.loader.prepare(batch))
    after = {
        name: gather(t, world) for name, t in trainer.step.recommender.tables.weights().items()
    }
    moved = {name: (after[name] != before[name]).any(1) for name in before}
    assert moved["user"][batch.users].all() and moved["item"][batch.items].all()
    others = np.setdiff1d(np.arange(len(moved["user"])), batch.users)
    assert not moved["user"][others].any()


def test_warm_up_raises_both_learning_rates_linearly(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(small_config(dataset, tmp_path, train={"warmup_steps": 4}), world)
    seen: dict[str, list[float]] = {"tables": [], "dense": []}
    monkeypatch.setattr(trainer.step.recommender.tables, "scale_lr", seen["tables"].append)
    monkeypatch.setattr(trainer.step.dense, "scale_lr", seen["dense"].append)
    for batch in trainer.stream.batches(0):
        trainer.take_step(trainer.loader.prepare(batch))
        trainer.progress.step += 1
    assert seen["tables"] == seen["dense"] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_step_minimises_the_written_out_objective(
    dataset: str, tmp_path: Path, world: World
) -> None:
    """Every weight reaches its term: the loss is their sum, and L2 is that of the raw rows."""
    config = small_config(
        dataset,
        tmp_path,
        loss={"l2": 0.7, "contrastive": 0.2, "diffusion": 3.0},
        objective={"kind": "bpr", "similarity": "dot", "temperature": 1.0},
        negatives={"share": "row"},
    )
    trainer = new_trainer(config, world)
    whole = {
        name: gather(t, world) for name, t in trainer.step.recommender.tables.weights().items()
    }
    *_, batch = trainer.stream.batches(0)  # the last one: it has pads
    assert batch.valid_rows < len(batch.users)
    seen: dict[str, Any] = {}
    make = trainer.step.sampler.negatives

    def negatives(latents: Any, draws: Any, progress: float) -> Any:
        seen["latents"], seen["made"] = latents, make(latents, draws, progress)
        return seen["made"]

    trainer.step.sampler.negatives = negatives  # type: ignore[method-assign]
    draws = Draws((config.run.seed, 0, batch.step), batch.streams, batch.width, world.device)
    candidates = trainer.step.sampler.candidates(batch, draws)[:, 0]
    got = {
        name: float(value)
        for name, value in trainer.take_step(trainer.loader.prepare(batch)).items()
    }
    latents, made = seen["latents"], seen["made"]
    rows = [whole["user"][batch.users], whole["item"][batch.items], whole["item"][candidates]]
    weight = torch.from_numpy(batch.weight) / batch.valid_rows
    l2 = 0.7 * sum(float(weight @ row.square().sum(1)) for row in rows) / 2
    margin = (latents.user_BD * (latents.positive_BD - made.vector_BND[:, 0])).sum(1).detach()
    bpr = -torch.nn.functional.logsigmoid(margin) @ weight
    assert got["l2"] == pytest.approx(l2, rel=1e-4)
    assert got["bpr"] == pytest.approx(float(bpr), rel=1e-4)
    terms = got["bpr"] + got["l2"] + got["diffusion"] + got["contrastive"]
    assert got["loss"] == pytest.approx(terms, rel=1e-4)
    diffusion = float(made.terms["diffusion"].detach() @ weight)
    assert got["diffusion"] == pytest.approx(diffusion, rel=1e-4)


def test_the_environment_is_the_positives_popularity_bucket(
    dataset: str, tmp_path: Path, world: World
) -> None:
    trainer = new_trainer(small_config(dataset, tmp_path), world)
    batch = next(iter(trainer.stream.batches(0)))
    latents, _ = trainer.step._encode(trainer.loader.prepare(batch))
    table = pq.read_table(f"{dataset}/ids/items").sort_by("row")
    expected = table["environment"].to_numpy()[batch.items]
    assert latents.environment_B.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_a_step_draws_by_epoch_and_step_and_knows_its_progress(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dataset, tmp_path / "run")
    trainer = new_trainer(config, world)
    keys: list[tuple[int, int, int]] = []
    progress: list[float] = []
    make = trainer.step.sampler.negatives

    def negatives(latents: Any, draws: Any, at: float) -> Any:
        progress.append(at)
        return make(latents, draws, at)

    def draws(key: tuple[int, int, int], *rest: Any) -> Draws:
        keys.append(key)
        return Draws(key, *rest)

    trainer.step.sampler.negatives = negatives  # type: ignore[method-assign]
    monkeypatch.setattr("cnsdiff_dist.training.loader.Draws", draws)
    trainer.fit(None)
    steps = trainer._plan.steps
    assert keys == [(0, epoch, step) for epoch in range(2) for step in range(steps)]
    assert progress == pytest.approx([step / (2 * steps) for step in range(2 * steps)])


def test_the_contrastive_noise_is_relative_to_the_length_of_the_positive(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer(small_config(dataset, tmp_path, loss={"contrastive": 0.1}), world)
    seen: list[torch.Tensor] = []

    def info_nce(anchor: torch.Tensor, positive: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((positive - anchor).norm(dim=1) / anchor.norm(dim=1))
        return anchor.sum(1)

    monkeypatch.setattr("cnsdiff_dist.models.losses.info_nce", info_nce)
    trainer.take_step(next(trainer.loader.steps(0)))
    assert seen[0].mean().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("kind", ["bpr", "softmax"])
def test_cosine_vectors_score_by_their_angle_over_the_temperature(
    dataset: str, tmp_path: Path, world: World, kind: str
) -> None:
    objective = {"kind": kind, "similarity": "cosine", "temperature": 0.2}
    trainer = new_trainer(small_config(dataset, tmp_path, objective=objective), world)
    trainer.take_step(next(trainer.loader.steps(0)))
    user_UD, item_ID = trainer.step.recommender.encode_all()
    assert torch.allclose(user_UD.norm(dim=1), torch.full((len(user_UD),), 5.0))
    assert torch.allclose(item_ID.norm(dim=1), torch.ones(len(item_ID)))
    encoder = trainer.step.recommender
    h_TD, _ = encoder.encode(encoder.block(np.array([3, 3]), np.array([5]), (0, 0, 0)))
    user, item = encoder.scored(*h_TD.split([2, 1]))
    assert torch.allclose(user[1], user_UD[3]) and torch.allclose(item[0], item_ID[5])
