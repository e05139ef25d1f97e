"""Sampled training end to end: odd graphs, several ranks, work made ahead, memory bounds."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cnsdiff_dist.cli import main
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.models.exact_propagation import propagate_own
from cnsdiff_dist.models.lightgcn import full_block, propagate
from cnsdiff_dist.models.recommender import AUTO_NODES, is_sampled
from cnsdiff_dist.training.loop import Trainer
from tests.distributed.test_sharded_tables import gather
from tests.support.preparing import prepare, write_parquet
from tests.support.ranks import run_ranks
from tests.support.small import small_config

SAMPLED = {"propagation": "sampled", "fan_out": [3, 2]}


def _trainer(config: Config) -> Trainer:
    world, manifest = join_world(60), load_manifest(config.data.url)
    return Trainer(config, manifest, open_graph(config.data.url, manifest), world)


def _train(config: Config) -> dict[str, Any]:
    """Train to the end; the tables, and every rank's own rows as evaluation sees them."""
    trainer = _trainer(config)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    trainer.fit(None)
    tables = trainer.recommender.tables
    whole = {
        name: gather(weight, trainer.world)[: tables.rows[name]]
        for name, weight in tables.weights().items()
    }
    return {"tables": whole, "own": trainer.recommender.encode_all(), "best": trainer.progress.best}


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
    for name, weight in trainer.recommender.tables.weights().items():
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
    assert not is_sampled(config, AUTO_NODES) and is_sampled(config, AUTO_NODES + 1)
    for kind in ("full", "sampled"):
        forced = small_config(dataset, tmp_path, model={"propagation": kind})
        assert is_sampled(forced, 1) == is_sampled(forced, 10**9) == (kind == "sampled")


# --- odd graphs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A hub that all users have, users and items without any edge, and edges that are there
    twice: the graph's files are rewritten, since `prepare` would make only the hub."""
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
        odd_dataset, tmp_path / "run", model={"propagation": kind, "fan_out": [3, 2]},
        train={"epochs": 2, "batch": 32},
    )  # fmt: skip
    ranks = run_ranks(2, _train, config)
    for rank in ranks:
        for rows in rank["own"]:
            assert torch.isfinite(rows).all() and (rows.norm(dim=1) > 0).all()
    assert ranks[0]["best"] >= 0


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_ranks_without_any_row_train_with_the_others(tmp_path: Path, kind: str) -> None:
    """2 train rows for 4 ranks: three serve nothing but pads, and own no row of the tables."""
    log = write_parquet(tmp_path / "log.parquet", user=[1, 2], item=[1, 2])
    valid = write_parquet(tmp_path / "valid.parquet", user=[1, 2], item=[2, 1])
    words = ["--valid-iid", valid, "--valid-ood-fraction", 0]
    prepare(tmp_path / "out", "--train", log, *words)
    config = small_config(
        str(tmp_path / "out"), tmp_path / "run", model={"propagation": kind},
        train={"epochs": 2, "batch": 8}, negatives={"kind": "uniform"},
    )  # fmt: skip
    ranks = run_ranks(4, _train, config)
    assert sum(len(rank["own"][0]) for rank in ranks) == 2
    assert all(np.isfinite(rank["best"]) for rank in ranks)


# --- inference ------------------------------------------------------------------------------


def _own(data: str, layers: int, piece: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import cnsdiff_dist.models.exact_propagation as propagation

    config = small_config(data, "unused", model={"layers": layers, "fan_out": [2] * layers})
    # Pieces, blocks of rows and of edges so small that each is cut in many places.
    propagation.PIECE_BYTES, propagation.ROWS, propagation.EDGES = piece, 7, 50
    trainer = _trainer(config)
    tables, world = trainer.recommender.tables, trainer.world
    graph = trainer.loader._recommender._graph
    own = propagate_own(tables, graph, layers, world)
    rows = torch.cat(
        [gather(weight, world)[: tables.rows[name]] for name, weight in tables.weights().items()]
    )
    none = np.empty(0, np.int64)
    return *own, propagate(full_block(graph, none, none), rows, layers)


@pytest.mark.distributed
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_each_rank_propagates_its_own_nodes_exactly(dataset: str, layers: int) -> None:
    ranks = run_ranks(4, _own, dataset, layers, 4 * 16 * 30)
    users, items = (torch.cat([rank[side] for rank in ranks]) for side in (0, 1))
    assert torch.allclose(torch.cat([users, items]), ranks[0][2], atol=1e-6)


# --- plan -----------------------------------------------------------------------------------

PLAN = ["plan", "configs/demo.yaml"]
H100 = ["--nodes", "4", "--gpus-per-node", "8", "--device", "h100"]


def _counts(users: str, items: str, edges: str) -> list[str]:
    return ["--users", users, "--items", items, "--edges", edges]


def test_two_billion_rows_plan_on_32_gpus(capsys: Any) -> None:
    words = [*PLAN, "model.dim=128", *H100, *_counts("2e9", "1e8", "2e10"), "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["placement"] == "device"
    (table,) = [table for table in plan["tables"] if table["name"] == "user"]
    assert len(table["shards"]) == 32 and sum(rows for _, rows, _ in table["shards"]) == 2e9
    held = plan["device"]["tables and optimizer"]
    assert held == pytest.approx((2e9 + 1e8) * (128 * 4 + 4) / 32, rel=0.01)
    assert "data.streams=32" in plan["changes"][0]


def test_what_does_not_fit_says_what_would(capsys: Any) -> None:
    words = [*PLAN, "model.dim=128", "data.streams=32", *H100, *_counts("5e9", "1e8", "2e10")]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert "does not fit the GPU memory" in line and "--nodes 8" in line
    assert "fp16" in line and "Traceback" not in line


@pytest.mark.parametrize("word", ["tables.placement=uvm", "tables.optimizer=adam"])
def test_what_only_gpus_do_is_planned_without_one(capsys: Any, word: str) -> None:
    words = [*PLAN, word, "data.streams=32", *H100, *_counts("1e6", "1e5", "1e7")]
    assert main(words) == 0
    assert "it fits" in capsys.readouterr().out


def test_a_plan_needs_sizes(capsys: Any) -> None:
    assert main([*PLAN, "--users", "5"]) == 2
    assert "give all three or none" in capsys.readouterr().err
    assert main([*PLAN, "data.url=/nowhere"]) == 2
    assert "no manifest.json here" in capsys.readouterr().err


def test_a_plan_samples_the_datasets_own_blocks(dataset: str, capsys: Any) -> None:
    words = [f"data.url={dataset}", "model.propagation=sampled", "model.fan_out=[3,2]"]
    cpu = ["--device", "cpu", "--gpus-per-node", "2"]
    assert main([*PLAN, *words, *cpu]) == 0
    shown = capsys.readouterr().out
    assert "it fits" in shown and "tables and optimizer" in shown
    assert main([*PLAN, *words, *cpu, "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    manifest = load_manifest(dataset)
    assert 0 < sizes["block_nodes"] <= manifest.users + manifest.items
    assert sizes["edges"] == manifest.graph.edges


@pytest.mark.slow
@pytest.mark.distributed
def test_the_planned_memory_is_what_a_run_uses(dataset: str, tmp_path: Path) -> None:
    """Within 15 %, where rows of 8,192 floats outweigh what a process starts with."""
    words = [f"data.url={dataset}", "model.dim=8192", "model.propagation=sampled"]
    words += ["model.fan_out=[3,2]", "train.max_steps=3", "train.batch=64", "generator.hidden=16"]
    words += ["negatives.kind=in_batch", f"run.dir={tmp_path / 'run'}"]
    plan = [sys.executable, "-m", "cnsdiff_dist", *PLAN, *words, "--device", "cpu", "--json"]
    planned = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
    expected = sum(json.loads(planned)["host"].values()) / 2**30
    command = [sys.executable, "-m", "cnsdiff_dist", "train", "configs/demo.yaml", *words]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (used,) = re.findall(r"at most ([0-9.]+) GiB a rank", shown)
    assert float(used) == pytest.approx(expected, rel=0.15)
