"""Diagnostics on samplers whose true values are known."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.commands.train import train
from cnsdiff_dist.comparison.diagnostics import Probe, _generated, diagnose, read_diagnostics
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest, read_split
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives, Pool
from cnsdiff_dist.training.step import TrainStep
from tests.support.small import small_config


def _probe(config: Config, world: World) -> Probe:
    run = OpenRun(config, load_manifest(config.data.url), world)
    step = TrainStep(config, run.graph, run.manifest.environments, world)
    return Probe(run, step, 0.0)


def _held_out(dataset: str) -> dict[int, set[int]]:
    manifest = load_manifest(dataset)
    found: dict[int, set[int]] = {}
    for name in set(manifest.splits) - {"train"}:
        for user, item in zip(*read_split(dataset, manifest, name), strict=True):
            found.setdefault(int(user), set()).add(int(item))
    return found


@pytest.mark.parametrize(("false", "rate"), [(True, 1.0), (False, 0.0)])
def test_a_sampler_of_held_out_positives_is_always_false_and_another_never(
    dataset: str, tmp_path: Path, world: World, false: bool, rate: float
) -> None:
    config = small_config(dataset, tmp_path, negatives={"kind": "uniform"})
    probe, held_out = _probe(config, world), _held_out(dataset)

    def negatives(encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        items = []
        for user in encoded.batch.users.tolist():
            liked = held_out.get(user, set())
            never = min(set(range(len(probe._item_ID))) - liked)
            items.append(min(liked) if false and liked else never)
        item_BN = torch.tensor(items)[:, None]
        return Negatives(probe._item_ID[item_BN], item_BN)

    probe._step.sampler.negatives = negatives  # type: ignore[method-assign]
    with torch.no_grad():
        result = probe.measure(steps=2)
    assert result["false_hard_negatives"] == result["false_negatives"] == rate
    assert 0 < result["chance"] < 0.5


@pytest.mark.parametrize("hardest", [True, False])
def test_of_shared_vectors_one_that_the_row_does_not_leave_out(hardest: bool) -> None:
    groups, width, shared = 2, 4, 6
    made_GSD, logit_BS = torch.randn(groups, shared, 3), torch.randn(groups * width, shared)
    logit_BS[torch.rand_like(logit_BS) < 0.5] = -torch.inf
    logit_BS[5] = -torch.inf
    logit_BS[:5, 2] = logit_BS[6:, 2] = 0.0
    logit_BN = torch.cat([torch.full((groups * width, 9), 5.0), logit_BS], dim=1)
    own_BND, hard_BD = torch.empty(groups * width, 0, 3), made_GSD.flatten(0, 1)
    negatives = Negatives(own_BND, hard_BD=hard_BD, pool=Pool(made_GSD, logit_BN))
    encoded: Any = SimpleNamespace(by_group=lambda rows: rows.unflatten(0, (groups, -1)))
    encoded.groups = groups
    got = _generated(encoded, negatives, logit_BN, hardest)
    for row in range(groups * width):
        seen = [c for c in range(shared) if logit_BS[row, c] > -torch.inf]
        if not seen:
            assert got[row].isnan().all() and row == 5
            continue
        best = max(seen, key=lambda c: float(logit_BS[row, c]))
        neighbour = min(seen, key=lambda c: (c - row) % shared)
        assert torch.equal(got[row], made_GSD[row // width, best if hardest else neighbour])


@pytest.mark.parametrize(("explained", "by_source"), [(1.0, True), (0.0, False)])
def test_the_variance_that_the_condition_explains(
    dataset: str, tmp_path: Path, world: World, explained: float, by_source: bool
) -> None:
    probe = _probe(small_config(dataset, tmp_path), world)
    sampler = probe._step.sampler
    make = sampler.negatives

    def negatives(encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        made = make(encoded, draws, progress)
        known = encoded.positive_BD if by_source else draws.normal(16)
        return replace(made, hard_BD=known)

    sampler.negatives = negatives  # type: ignore[method-assign]
    with torch.no_grad():
        result = probe.measure(steps=3)
    assert result["condition_variance"] == pytest.approx(explained, abs=0.1)


def test_the_nearest_item_is_that_of_a_loop(dataset: str, tmp_path: Path, world: World) -> None:
    probe = _probe(small_config(dataset, tmp_path), world)
    users, vectors = np.array([0, 5, 9]), torch.randn(3, 16)
    got = probe._nearest(users, vectors)
    graph = probe._graph
    for user, vector, item in zip(users, vectors, got, strict=True):
        train_items = graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]]
        allowed = [i for i in range(len(probe._item_ID)) if i not in set(train_items.tolist())]
        cosine = {
            i: float(torch.cosine_similarity(vector, probe._item_ID[i], dim=0))
            for i in allowed
            if probe._item_ID[i].norm() > 0
        }
        assert cosine[int(item)] == pytest.approx(max(cosine.values()), abs=1e-5)


def test_score_popularity_is_a_mean_squared_correlation(
    dataset: str, tmp_path: Path, world: World
) -> None:
    probe = _probe(small_config(dataset, tmp_path), world)
    degree = np.log1p(np.diff(probe._graph.item_indptr))
    some = np.linspace(0, len(probe._user_UD) - 1, 512).astype(int)
    scores = (probe._user_UD[some] @ probe._item_ID.t()).detach().numpy()
    expected = np.mean([np.corrcoef(row, degree)[0, 1] ** 2 for row in scores])
    with torch.no_grad():
        assert probe._score_popularity() == pytest.approx(float(expected), abs=1e-3)


def test_a_run_is_diagnosed_and_stays_as_it_is(dataset: str, tmp_path: Path, world: World) -> None:
    run = tmp_path / "run"
    train(small_config(dataset, run, train={"epochs": 1}))
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    result: dict[str, Any] = diagnose(str(run))
    assert read_diagnostics(str(run)) == result == diagnose(str(run))
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before
    for name in ("false_hard_negatives", "hardness", "true_preference", "condition_variance"):
        assert 0 <= result[name] <= 1
    assert 0 < result["denoising_error"] < 1.5
