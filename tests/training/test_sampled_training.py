"""Training on sampled neighbours: several ranks, resumed, work made ahead, odd graphs."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.models.recommender import AUTO_NODES, is_sampled
from cnsdiff_dist.training.loop import Trainer
from tests.support.preparing import prepare, write_parquet
from tests.support.ranks import run_ranks
from tests.support.small import small_config
from tests.support.tables import gather
from tests.support.trainers import new_trainer

SAMPLED = {"propagation": "sampled", "fan_out": [3, 2]}


def _trainer(config: Config) -> Trainer:
    return new_trainer(config, join_world(60))


def _train(config: Config) -> dict[str, Any]:
    """Train to the end; the tables, and every rank's own rows as evaluation sees them."""
    trainer = _trainer(config)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    trainer.fit(None)
    tables = trainer.step.recommender.tables
    whole = {
        name: gather(weight, trainer.world)[: tables.rows[name]]
        for name, weight in tables.weights().items()
    }
    return {
        "tables": whole,
        "own": trainer.step.recommender.encode_all(),
        "best": trainer.progress.best,
    }


@pytest.mark.distributed
def test_two_ranks_sample_and_train_what_one_does(
    dataset: str, tmp_path: Path, world: World
) -> None:
    """Samples are keyed by node, so each rank's smaller block holds the same neighbours."""
    alone = _train(small_config(dataset, tmp_path / "one", model=SAMPLED))
    both = run_ranks(2, _train, small_config(dataset, tmp_path / "two", model=SAMPLED))
    for side, name in enumerate(("user", "item")):
        assert torch.allclose(both[0]["tables"][name], alone["tables"][name], atol=2e-4)
        own = torch.cat([rank["own"][side] for rank in both])
        assert torch.allclose(own, alone["own"][side], atol=2e-3)
    assert both[0]["best"] == pytest.approx(alone["best"], abs=0.01)


def test_a_resumed_run_samples_the_same(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(dataset, tmp_path / "whole", model=SAMPLED)
    whole = _train(config)
    first = small_config(dataset, tmp_path / "parts", model=SAMPLED, train={"max_steps": 3})
    _train(first)
    trainer = _trainer(small_config(dataset, tmp_path / "parts", model=SAMPLED))
    assert trainer.resume() is not None and trainer.progress.step == 3
    trainer.progress.evaluations_since_best = 0
    trainer.fit(None)
    for name, weight in trainer.step.recommender.tables.weights().items():
        got = gather(weight, world)[: len(whole["tables"][name])]
        assert torch.equal(got, whole["tables"][name])


def test_the_last_step_of_a_short_run_is_evaluated(
    dataset: str, tmp_path: Path, world: World
) -> None:
    trainer = _trainer(small_config(dataset, tmp_path / "run", train={"max_steps": 2}))
    (tmp_path / "run").mkdir()
    trainer.fit(None)
    assert trainer.finished and trainer.progress.step == trainer.progress.best_step == 2


def test_what_is_made_ahead_is_what_the_step_would_make(
    dataset: str, tmp_path: Path, world: World
) -> None:
    """Also with several workers, and from the middle of an epoch."""
    config = small_config(dataset, tmp_path, model=SAMPLED, data={"workers": 3})
    loader = _trainer(config).loader
    ahead = list(loader.steps(1, 2))
    assert [ready.batch.step for ready in ahead] == list(range(2, 2 + len(ahead)))
    for ready in ahead:
        again = loader.prepare(ready.batch)
        assert np.array_equal(ready.candidates, again.candidates)
        assert torch.equal(ready.block.users, again.block.users)
        for hop, same in zip(ready.block.hops, again.block.hops, strict=True):
            assert torch.equal(hop.operator.values(), same.operator.values())


def test_auto_samples_large_graphs_only(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path)
    assert not is_sampled(config.model, AUTO_NODES) and is_sampled(config.model, AUTO_NODES + 1)
    for kind in ("full", "sampled"):
        forced = small_config(dataset, tmp_path, model={"propagation": kind})
        assert is_sampled(forced.model, 1) == is_sampled(forced.model, 10**9) == (kind == "sampled")


@pytest.fixture(scope="module")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A graph with a hub that all users have, nodes without any edge, and duplicate edges.

    `prepare` makes only the hub, so the files of the graph are rewritten.
    """
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 4)
    items = np.concatenate(
        [[0, *rng.choice(np.arange(1, 30), 3, replace=False)] for _ in range(40)]
    )
    log = write_parquet(folder / "log.parquet", user=users, item=items)
    words = ["--valid-ood-fraction", 0, "--valid-fraction", 0.1]
    prepare(folder / "out", "--train", log, *words)
    _make_odd(folder / "out")
    return str(folder / "out")


def _make_odd(root: Path, isolated: int = 3) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    graph = manifest["graph"]

    def rewrite(name: str, array: np.ndarray) -> None:
        (blob,) = graph[name]
        data = array.tobytes()
        (root / blob["path"]).write_bytes(data)
        blob.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    for side, other in (("user", "items"), ("item", "users")):
        indptr = np.fromfile(root / graph[f"{side}_indptr"][0]["path"], "<i8")
        indices = np.fromfile(root / graph[f"{side}_{other}"][0]["path"], "<i4")
        # Row 0 has its first neighbour twice, in this direction only as in a multigraph.
        twice = np.concatenate([indices[:1], indices])
        rewrite(f"{side}_{other}", twice)
        rewrite(
            f"{side}_indptr",
            np.append(indptr[:1], [*(indptr[1:] + 1)] + [indptr[-1] + 1] * isolated),
        )
        manifest[f"{side}s"] += isolated
    graph["edges"] += 1
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_odd_graphs_train(odd_dataset: str, tmp_path: Path, kind: str) -> None:
    config = small_config(
        odd_dataset,
        tmp_path / "run",
        model={"propagation": kind, "fan_out": [3, 2]},
        train={"epochs": 2, "batch": 32},
    )
    ranks = run_ranks(2, _train, config)
    for rank in ranks:
        for rows in rank["own"]:
            assert torch.isfinite(rows).all() and (rows.norm(dim=1) > 0).all()
    assert ranks[0]["best"] >= 0


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_ranks_without_any_row_train_with_the_others(tmp_path: Path, kind: str) -> None:
    """With 2 train rows for 4 ranks, some have nothing but pads and own no row of a table."""
    log = write_parquet(tmp_path / "log.parquet", user=[1, 2], item=[1, 2])
    valid = write_parquet(tmp_path / "valid.parquet", user=[1, 2], item=[2, 1])
    words = ["--valid-iid", valid, "--valid-ood-fraction", 0]
    prepare(tmp_path / "out", "--train", log, *words)
    config = small_config(
        str(tmp_path / "out"),
        tmp_path / "run",
        model={"propagation": kind},
        train={"epochs": 2, "batch": 8},
        negatives={"kind": "uniform"},
    )
    ranks = run_ranks(4, _train, config)
    assert sum(len(rank["own"][0]) for rank in ranks) == 2
    assert all(np.isfinite(rank["best"]) for rank in ranks)
