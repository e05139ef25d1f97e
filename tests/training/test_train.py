"""The main job through the command line, at one process and on several ranks."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.config import Evaluation
from cnsdiff_dist.data.dataset import load_manifest, read_split
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.distributed.dense_engine import State
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.inference.trained_model import open_trained
from cnsdiff_dist.runs.directory import _check_same
from cnsdiff_dist.training.loop import Trainer
from tests.distributed.test_sharded_tables import gather
from tests.support.ranks import files_under, run_ranks
from tests.support.sealing import seal
from tests.support.small import small_config


def _write_config(folder: Path, dataset: str, **sections: dict[str, object]) -> str:
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(small_config(dataset, folder / "run", **sections).model_dump(mode="json"))
    )
    return str(path)


def _lines(run: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", _write_config(folder, dataset)]) == 0
    return folder / "run"


def test_a_run_leaves_its_record(trained: Path, dataset: str) -> None:
    assert {"config.yaml", "dataset.json", "environment.json", "metrics.jsonl"} <= set(
        files_under(trained)
    )
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["world_size"] == 1 and "git_revision" in environment
    losses = [line["loss"] for line in _lines(trained, "train")]
    assert losses[-1] < losses[0]
    assert all(line["samples_per_second"] > 0 for line in _lines(trained, "train"))
    assert {"softmax", "l2", "diffusion", "hardness", "denoising_error"} <= set(
        _lines(trained, "train")[0]
    )
    assert len(_lines(trained, "valid_iid")) == 2
    assert any("tfevents" in name for name in files_under(trained / "tensorboard"))


def test_a_finished_run_stays_as_it_is(trained: Path, dataset: str, tmp_path: Path) -> None:
    before = (trained / "metrics.jsonl").read_text()
    words = ["train", _write_config(tmp_path, dataset), f"run.dir={trained}"]
    assert main(words) == 0
    assert (trained / "metrics.jsonl").read_text() == before


# --- equality of what is trained ----------------------------------------------------------


def _trainer(config: Any, world: World) -> Trainer:
    manifest = load_manifest(config.data.url)
    return Trainer(config, manifest, open_graph(config.data.url, manifest), world)


def _everything(trainer: Trainer, world: World) -> tuple[dict[str, torch.Tensor], State]:
    """Every number of a training: tables, their optimizer state, generator and Adam."""
    tables = trainer.state()["tables"]
    flat = {name: gather(tensor, world) for name, tensor in tables["weights"].items()}
    for table in ("user", "item"):
        # With table-wise sharding a rank knows only the state of its own tables.
        mine = tables["optimizer"].get(f"{table}.momentum1")
        shape = (
            flat[table].shape
            if trainer.config.tables.optimizer == "adagrad"
            else [len(flat[table])]
        )
        whole = torch.zeros(shape)
        for shard in mine.local_shards() if mine is not None else []:
            first, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            whole[first : first + rows] = shard.tensor.detach()
        flat[f"{table}.momentum1"] = world.sum(whole)
    return flat, trainer.dense.state()


def _train_steps(config: Any, stop_after: int | None) -> Any:
    """Train, or resume, in a new process group; stop dead after some steps of this process."""
    world = join_world(60)
    train_dir = Path(config.run.dir)
    train_dir.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config, world)
    trainer.resume()
    done, real_step = 0, trainer.step

    def step(batch: Any) -> Any:
        nonlocal done
        if stop_after is not None and done == stop_after:
            raise KeyboardInterrupt
        done += 1
        return real_step(batch)

    trainer.step = step  # type: ignore[method-assign]
    try:
        trainer.fit(None)
    except KeyboardInterrupt:
        return None
    return *_everything(trainer, world), asdict(trainer.progress)


def _assert_same(a: Any, b: Any, exact: bool) -> None:
    def check(x: torch.Tensor, y: torch.Tensor, where: str) -> None:
        # Relative to the tensor's own size: an optimizer's moments may be as small as 1e-7.
        distance = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        assert torch.equal(x, y) if exact else distance < 1e-3, f"{where}: {distance}"

    for name in a[0]:
        check(a[0][name], b[0][name], name)
    assert a[1].keys() == b[1].keys()
    assert a[2] == (b[2] if exact else pytest.approx(b[2], rel=0.05))
    for name in a[1]:
        for key in a[1][name]:
            check(a[1][name][key], b[1][name][key], f"{name}.{key}")


EVERY_3 = {"every_steps": 3}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"negatives": {"kind": "uniform"}, "model": {"layers": 0}},
        {"generator": {"zero_stage": 3}, "tables": {"optimizer": "adagrad"}},
    ],
    ids=["cnsdiff", "uniform-L0", "zero3-adagrad"],
)
def test_interrupted_and_resumed_is_bit_identical(
    dataset: str, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Killed in the middle of an epoch, between two checkpoints, and again."""
    whole = _train_steps(small_config(dataset, tmp_path / "whole", **sections), None)
    cut = small_config(dataset, tmp_path / "cut", checkpoint=EVERY_3, **sections)
    assert _train_steps(cut, 7) is None
    assert _train_steps(cut, 10) is None
    _assert_same(_train_steps(cut, None), whole, exact=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"negatives": {"kind": "uniform"}, "model": {"layers": 0}},
        {"generator": {"zero_stage": 3}, "tables": {"sharding": "table_wise"}},
    ],
    ids=["cnsdiff", "uniform-L0", "zero3-table-wise"],
)
def test_two_ranks_train_what_one_trains(
    dataset: str, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """The same global batches, draws and updates: equal up to the order of float sums."""
    sections = {**sections, "train": {"epochs": 1}}
    alone = _train_steps(small_config(dataset, tmp_path / "alone", **sections), None)
    config = small_config(dataset, tmp_path / "two", **sections)
    for rank in run_ranks(2, _train_steps, config, None):
        _assert_same(rank, alone, exact=False)


@pytest.mark.distributed
def test_a_run_resumes_at_another_world_size(dataset: str, tmp_path: Path) -> None:
    whole = _train_steps(small_config(dataset, tmp_path / "whole", train={"epochs": 1}), None)
    config = small_config(dataset, tmp_path / "cut", checkpoint=EVERY_3, train={"epochs": 1})
    assert run_ranks(2, _train_steps, config, 5) == [None, None]
    _assert_same(_train_steps(config, None), whole, exact=False)


@pytest.mark.distributed
def test_a_run_resumes_under_another_sharding_and_zero_stage(dataset: str, tmp_path: Path) -> None:
    def config(run: str, **sections: dict[str, Any]) -> Any:
        train_section = {"checkpoint": EVERY_3, "train": {"epochs": 1}}
        return small_config(dataset, tmp_path / run, **train_section, **sections)

    whole, first = _train_steps(config("whole"), None), config("cut")
    assert run_ranks(2, _train_steps, first, 5) == [None, None]
    other = config("cut", tables={"sharding": "table_wise"}, generator={"zero_stage": 3})
    _check_same(first, other, "config.yaml")  # `cnsdiff train` lets it pass
    for rank in run_ranks(2, _train_steps, other, None):
        _assert_same(rank, whole, exact=False)


# --- checkpoints ----------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(
        dataset,
        tmp_path / "run",
        checkpoint={"every_steps": 2, "keep": 2},
        train={"epochs": 3, "batch": 1024},
    )
    trainer = _trainer(config, world)
    (tmp_path / "run").mkdir()
    trainer.fit(None)
    last = trainer.progress.step
    every = set(range(2, last + 1, 2)) | {(epoch + 1) * trainer._plan.steps for epoch in range(3)}
    steps = [commit.step for commit in Checkpoints(config.run.dir, world).committed()]
    assert steps == sorted({*sorted(every)[-2:], trainer.progress.best_step})


def test_an_uncommitted_checkpoint_does_not_exist(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(dataset, tmp_path / "run", train={"epochs": 1})
    (tmp_path / "run").mkdir()
    trainer = _trainer(config, world)
    trainer.fit(None)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    torn = newest.parent / "step-00000999"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert [c.step for c in trainer.checkpoints.committed()] == [trainer.progress.step]
    trainer.checkpoints.prune(1, None)
    assert not torn.exists() and newest.exists()


def test_a_run_killed_while_it_trains_is_continued_by_the_same_command(
    dataset: str, tmp_path: Path
) -> None:
    config = _write_config(
        tmp_path, dataset, checkpoint={"every_steps": 2}, train={"epochs": 60, "patience": 99}
    )
    command = [sys.executable, "-m", "cnsdiff_dist", "train", config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "run"
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/*/commit.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = subprocess.run([*command, "train.epochs=3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    steps = [line["step"] for line in _lines(run, "train")]
    assert steps == sorted(set(steps))  # nothing is logged twice


# --- what leaves a run ----------------------------------------------------------------------


def test_evaluate_writes_what_it_prints(trained: Path, dataset: str, capsys: Any) -> None:
    assert main(["evaluate", str(trained), "--split", "test_iid", "--k", "5", "20", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((trained / "evaluations/test_iid.json").read_text())
    assert printed == saved
    manifest = load_manifest(dataset)
    users, _ = read_split(dataset, manifest, "test_iid")
    assert saved["users"] == len(np.unique(users))
    assert saved["masked"] == ["train", "valid_iid", "valid_ood"]
    assert set(saved["metrics"]) == {
        f"{name}@{k}"
        for name in ("recall", "ndcg", "hit", "precision", "coverage", "popularity")
        for k in (5, 20)
    }
    assert sum(entry["items"] for entry in saved["environments"]) == manifest.items


def _evaluate(run: str) -> int:
    join_world(60)
    return main(["evaluate", run, "--split", "test_ood"])


@pytest.mark.distributed
def test_two_ranks_evaluate_like_one(trained: Path) -> None:
    path = trained / "evaluations/test_ood.json"
    assert _evaluate(str(trained)) == 0
    alone = json.loads(path.read_text())
    path.unlink()
    assert run_ranks(2, _evaluate, str(trained)) == [0, 0]
    both = json.loads(path.read_text())
    assert both["metrics"] == pytest.approx(alone["metrics"])
    assert both["users"] == alone["users"]


def test_export_and_recommend_agree_on_raw_ids(trained: Path, dataset: str, tmp_path: Path) -> None:
    assert main(["export", str(trained), str(tmp_path / "e")]) == 0
    assert main(["recommend", str(trained), str(tmp_path / "r"), "--k", "7"]) == 0
    tables = {side: pq.read_table(tmp_path / "e" / side) for side in ("users", "items")}
    vectors = {
        side: dict(
            zip(table["id"].to_pylist(), np.stack(table["embedding"].to_pylist()), strict=True)
        )
        for side, table in tables.items()
    }
    manifest = load_manifest(dataset)
    assert len(vectors["users"]) == manifest.users and len(vectors["items"]) == manifest.items
    rows = pq.read_table(tmp_path / "r", columns=["user", "item", "score", "rank"]).to_pylist()
    assert len(rows) == manifest.users * 7
    known = _raw_train_pairs(dataset)
    items, matrix = list(vectors["items"]), np.stack(list(vectors["items"].values()))
    for start in range(0, len(rows), 7):
        mine = rows[start : start + 7]
        user = mine[0]["user"]
        score = matrix @ vectors["users"][user]
        score[[index for index, item in enumerate(items) if (user, item) in known]] = -np.inf
        assert [row["rank"] for row in mine] == list(range(1, 8))
        assert [row["score"] for row in mine] == pytest.approx(np.sort(score)[::-1][:7], rel=1e-4)
        assert all((user, row["item"]) not in known for row in mine)


def _raw_train_pairs(dataset: str) -> set[tuple[Any, Any]]:
    ids = {
        side: pq.read_table(f"{dataset}/ids/{side}")["id"].to_pylist()
        for side in ("users", "items")
    }
    table = pq.read_table(f"{dataset}/train")
    return {
        (ids["users"][u], ids["items"][i])
        for u, i in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True)
    }


def test_recommend_for_listed_users_only(trained: Path, dataset: str, tmp_path: Path) -> None:
    raw = pq.read_table(f"{dataset}/ids/users")["id"].to_pylist()
    (tmp_path / "users.txt").write_text(f"{raw[3]}\n{raw[0]}\n\n")
    words = ["recommend", str(trained), str(tmp_path / "r"), "--users", str(tmp_path / "users.txt")]
    assert main(words) == 0
    assert set(pq.read_table(tmp_path / "r")["user"].to_pylist()) == {raw[0], raw[3]}


def test_a_second_output_replaces_the_first(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/part-00007.parquet").write_bytes(b"of an older, larger world")
    (tmp_path / "r/_SUCCESS").write_bytes(b'{"step": 3}')
    assert main(["recommend", str(trained), str(tmp_path / "r")]) == 0
    assert files_under(tmp_path / "r") == ["_SUCCESS", "part-00000.parquet"]


# --- the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uniform", "cnsdiff"])
def test_bpr_alone_reaches_the_rows_of_its_batch(
    dataset: str, tmp_path: Path, world: World, kind: str
) -> None:
    config = small_config(
        dataset, tmp_path, negatives={"kind": kind}, model={"layers": 0},
        loss={"contrastive": 0.0, "diffusion": 0.0, "l2": 0.0},
    )  # fmt: skip
    trainer = _trainer(config, world)
    before = {name: gather(t, world) for name, t in trainer.recommender.tables.weights().items()}
    batch = next(iter(trainer.stream.batches(0)))
    trainer.step(trainer.loader.prepare(batch))
    after = {name: gather(t, world) for name, t in trainer.recommender.tables.weights().items()}
    moved = {name: (after[name] != before[name]).any(1) for name in before}
    assert moved["user"][batch.users].all() and moved["item"][batch.items].all()
    others = np.setdiff1d(np.arange(len(moved["user"])), batch.users)
    assert not moved["user"][others].any()


def test_warm_up_raises_both_learning_rates_linearly(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(small_config(dataset, tmp_path, train={"warmup_steps": 4}), world)
    seen: dict[str, list[float]] = {"tables": [], "dense": []}
    monkeypatch.setattr(trainer.recommender.tables, "scale_lr", seen["tables"].append)
    monkeypatch.setattr(trainer.dense, "scale_lr", seen["dense"].append)
    for batch in trainer.stream.batches(0):
        trainer.step(trainer.loader.prepare(batch))
        trainer.progress.step += 1
    assert seen["tables"] == seen["dense"] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_stops_early_when_validation_does_not_improve(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(
        dataset, tmp_path, tables={"optimizer": "sgd", "lr": 1e-12},
        train={"epochs": 50, "patience": 2, "evaluations_per_epoch": 2},
    )  # fmt: skip
    trainer = _trainer(config, world)
    trainer.fit(None)
    assert trainer.finished and trainer.progress.evaluations_since_best == 2
    assert trainer.progress.step < 3 * trainer._plan.steps


def test_a_step_minimises_the_written_out_objective(
    dataset: str, tmp_path: Path, world: World
) -> None:
    """Every weight reaches its term: the loss is their sum, and L2 is that of the raw rows."""
    config = small_config(
        dataset, tmp_path, loss={"l2": 0.7, "contrastive": 0.2, "diffusion": 3.0},
        objective={"kind": "bpr", "similarity": "dot", "temperature": 1.0},
        negatives={"share": "row"},
    )  # fmt: skip
    trainer = _trainer(config, world)
    whole = {name: gather(t, world) for name, t in trainer.recommender.tables.weights().items()}
    *_, batch = trainer.stream.batches(0)  # the last one: it has pads
    assert batch.valid_rows < len(batch.users)
    seen: dict[str, Any] = {}
    make = trainer.sampler.negatives

    def negatives(latents: Any, draws: Any, progress: float) -> Any:
        seen["latents"], seen["made"] = latents, make(latents, draws, progress)
        return seen["made"]

    trainer.sampler.negatives = negatives  # type: ignore[method-assign]
    draws = Draws((config.run.seed, 0, batch.step), batch.streams, batch.width, world.device)
    candidates = trainer.sampler.candidates(batch, draws)[:, 0]
    got = {
        name: float(value) for name, value in trainer.step(trainer.loader.prepare(batch)).items()
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
    trainer = _trainer(small_config(dataset, tmp_path), world)
    batch = next(iter(trainer.stream.batches(0)))
    latents, _ = trainer._encode(trainer.loader.prepare(batch))
    table = pq.read_table(f"{dataset}/ids/items").sort_by("row")
    expected = table["environment"].to_numpy()[batch.items]
    assert latents.environment.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1


@pytest.mark.parametrize("test", ["test_iid", "test_ood"])
def test_validation_items_are_not_recommended_in_a_test(
    dataset: str, world: World, test: str
) -> None:
    """A model that scores the validation items highest must find the test items all the same."""
    manifest = load_manifest(dataset)
    graph = open_graph(dataset, manifest)
    score = torch.zeros(manifest.users, manifest.items)
    for split, value in (("valid_iid", 3.0), ("valid_ood", 2.0), (test, 1.0)):
        users, items = read_split(dataset, manifest, split)
        score[torch.tensor(users), torch.tensor(items)] = value
    evaluator = Evaluator(dataset, manifest, graph, test, Evaluation(k=(100,)), world)
    metrics = evaluator(score, torch.eye(manifest.items))["metrics"]
    assert metrics["recall@100"] == metrics["ndcg@100"] == pytest.approx(1.0)


def test_the_best_checkpoint_is_what_is_opened(dataset: str, tmp_path: Path, world: World) -> None:
    """Best, newest and oldest are three different checkpoints here."""
    config = small_config(dataset, tmp_path / "run", train={"epochs": 3}, checkpoint={"keep": 9})
    train(config)
    checkpoints = Checkpoints(config.run.dir, world)
    oldest, middle, newest = checkpoints.committed()
    record = json.loads((Path(newest.url) / "commit.json").read_text())
    record["progress"]["best_step"] = middle.step
    seal(Path(newest.url), record)
    assert oldest.step < middle.step < newest.step
    assert open_trained(config.run.dir, None).step == middle.step
    shutil.rmtree(middle.url)
    with pytest.raises(UserError, match=r"best checkpoint.* is gone"):
        open_trained(config.run.dir, None)


def test_a_model_that_is_not_finite_is_never_saved(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(
        dataset, tmp_path / "run", tables={"optimizer": "sgd", "lr": 1e30},
        train={"log_every": 1000}, checkpoint={"every_steps": 1},
    )  # fmt: skip
    with pytest.raises(UserError, match="diverged"):
        train(config)
    trainer = _trainer(config, world)
    assert trainer.resume()
    tables, dense = _everything(trainer, world)
    assert all(torch.isfinite(tensor).all() for tensor in tables.values())
    assert all(torch.isfinite(value).all() for entry in dense.values() for value in entry.values())


def _pickled_call(module: str, name: str, *words: Any) -> bytes:
    """A pickle that calls a function, found under the name it has in a module."""
    parts = [pickle.SHORT_BINUNICODE + bytes([len(w)]) + w.encode() for w in (module, name)]
    arguments = pickle.dumps(words, protocol=2)[2:-1]
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STACK_GLOBAL + arguments + b"R."


@pytest.mark.parametrize("name", ["posix mkdir", "torch.distributed.checkpoint.metadata os.mkdir"])
def test_a_checkpoint_that_would_run_code_is_refused(
    name: str, dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(dataset, tmp_path / "run", train={"epochs": 1})
    train(config)
    (commit,) = Checkpoints(config.run.dir, world).committed()
    payload = _pickled_call(*name.split(), str(tmp_path / "owned"))
    (Path(commit.url) / ".metadata").write_bytes(payload)
    seal(Path(commit.url))
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        open_trained(config.run.dir, None)
    assert not (tmp_path / "owned").exists()
    pickle.loads(payload)
    assert (tmp_path / "owned").exists()  # it would have


class _AsPython311(pickle.Pickler):
    """Enum members as Python 3.11.0 to 3.11.3 pickles them."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def test_checkpoints_of_every_python_311_can_be_read(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(dataset, tmp_path / "run", train={"epochs": 1})
    train(config)
    (commit,) = Checkpoints(config.run.dir, world).committed()
    path = Path(commit.url) / ".metadata"
    with path.open("rb") as file:
        metadata = pickle.load(file)
    with path.open("wb") as file:
        _AsPython311(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    seal(path.parent)
    open_trained(config.run.dir, None)

    path.write_bytes(_pickled_call("builtins", "getattr", "text", "upper"))
    seal(path.parent)
    with pytest.raises(UserError, match="of no enum: not a checkpoint of ours"):
        open_trained(config.run.dir, None)


def test_an_output_never_deletes_what_is_not_its_own(trained: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "train").mkdir(parents=True)
    (target / "train/part-00000.parquet").write_bytes(b"someone's")
    for command in ("export", "recommend"):
        assert main([command, str(trained), str(target)]) == 2
    assert files_under(target) == ["train/part-00000.parquet"]


def test_a_step_draws_by_epoch_and_step_and_knows_its_progress(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dataset, tmp_path / "run")
    trainer = _trainer(config, world)
    keys: list[tuple[int, int, int]] = []
    progress: list[float] = []
    make = trainer.sampler.negatives

    def negatives(latents: Any, draws: Any, at: float) -> Any:
        progress.append(at)
        return make(latents, draws, at)

    def draws(key: tuple[int, int, int], *rest: Any) -> Draws:
        keys.append(key)
        return Draws(key, *rest)

    trainer.sampler.negatives = negatives  # type: ignore[method-assign]
    monkeypatch.setattr("cnsdiff_dist.training.loader.Draws", draws)
    trainer.fit(None)
    steps = trainer._plan.steps
    assert keys == [(0, epoch, step) for epoch in range(2) for step in range(steps)]
    assert progress == pytest.approx([step / (2 * steps) for step in range(2 * steps)])


def test_an_epoch_is_not_resumed_in_another_order(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dataset, tmp_path / "run", checkpoint={"every_steps": 5})
    steps = _trainer(config, world)._plan.steps
    assert steps % 5 and _train_steps(config, steps + 4) is None
    monkeypatch.setattr("cnsdiff_dist.training.loop.ROW_ORDER", 2)
    before = (tmp_path / "run/checkpoints/owner.json").read_bytes()
    with pytest.raises(UserError, match="took the rows in another order; finish its epoch"):
        _trainer(config, world).resume()
    assert (tmp_path / "run/checkpoints/owner.json").read_bytes() == before
    for newer in list((tmp_path / "run/checkpoints").iterdir()):
        if newer.name > f"step-{steps:08d}":
            shutil.rmtree(newer)
    trainer = _trainer(config, world)
    assert trainer.resume() and trainer.progress.step == steps
    assert trainer.progress.row_order == 2


def test_resuming_restores_all_of_the_progress(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(
        dataset, tmp_path / "run", tables={"optimizer": "sgd", "lr": 1e-12}, train={"epochs": 3}
    )
    trainer = _trainer(config, world)
    trainer.fit(None)
    again = _trainer(config, world)
    again.resume()
    assert again.progress == trainer.progress
    assert again.progress.evaluations_since_best == 2 and again.progress.best > 0


def _export(run: str, out: str) -> int:
    join_world(60)
    return main(["export", run, f"{out}/e"]) + main(["recommend", run, f"{out}/r", "--k", "3"])


@pytest.mark.distributed
def test_two_ranks_export_and_recommend_like_one(trained: Path, tmp_path: Path) -> None:
    assert _export(str(trained), str(tmp_path / "one")) == 0
    assert run_ranks(2, _export, str(trained), str(tmp_path / "two")) == [0, 0]
    for side in ("users", "items"):
        one, two = (pq.read_table(tmp_path / n / "e" / side).to_pydict() for n in ("one", "two"))
        assert one["id"] == two["id"]
        assert np.allclose(one["embedding"], two["embedding"], atol=1e-6)
    one, two = (pq.read_table(tmp_path / n / "r").to_pydict() for n in ("one", "two"))
    assert one["user"] == two["user"] and one["item"] == two["item"]


def test_the_contrastive_noise_is_relative_to_the_length_of_the_positive(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(small_config(dataset, tmp_path, loss={"contrastive": 0.1}), world)
    seen: list[torch.Tensor] = []

    def info_nce(anchor: torch.Tensor, positive: torch.Tensor, *_: object) -> torch.Tensor:
        seen.append((positive - anchor).norm(dim=1) / anchor.norm(dim=1))
        return anchor.sum(1)

    monkeypatch.setattr("cnsdiff_dist.models.losses.info_nce", info_nce)
    trainer.step(next(trainer.loader.steps(0)))
    assert seen[0].mean().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("kind", ["bpr", "softmax"])
def test_cosine_vectors_score_by_their_angle_over_the_temperature(
    dataset: str, tmp_path: Path, world: World, kind: str
) -> None:
    objective = {"kind": kind, "similarity": "cosine", "temperature": 0.2}
    trainer = _trainer(small_config(dataset, tmp_path, objective=objective), world)
    trainer.step(next(trainer.loader.steps(0)))
    user_UD, item_ID = trainer.recommender.encode_all()
    assert torch.allclose(user_UD.norm(dim=1), torch.full((len(user_UD),), 5.0))
    assert torch.allclose(item_ID.norm(dim=1), torch.ones(len(item_ID)))
    encoder = trainer.recommender
    h_TD, _ = encoder.encode(encoder.block(np.array([3, 3]), np.array([5]), (0, 0, 0)))
    user, item = encoder.scored(*h_TD.split([2, 1]))
    assert torch.allclose(user[1], user_UD[3]) and torch.allclose(item[0], item_ID[5])
