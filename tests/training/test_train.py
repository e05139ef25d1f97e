"""`cnsdiff train`: the record of a run, its checkpoints, and when it ends."""

import json
from pathlib import Path

import pytest
import torch

from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from tests.support.ranks import files_under
from tests.support.runs import metric_lines
from tests.support.small import small_config, write_config
from tests.support.trainers import everything, new_trainer, trained_run


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(dataset, tmp_path_factory.mktemp("trained"))


def test_a_run_leaves_its_record(trained: Path, dataset: str) -> None:
    assert {"config.yaml", "dataset.json", "environment.json", "metrics.jsonl"} <= set(
        files_under(trained)
    )
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["world_size"] == 1 and "git_revision" in environment
    losses = [line["loss"] for line in metric_lines(trained, "train")]
    assert losses[-1] < losses[0]
    assert all(line["samples_per_second"] > 0 for line in metric_lines(trained, "train"))
    assert {"softmax", "l2", "diffusion", "hardness", "denoising_error"} <= set(
        metric_lines(trained, "train")[0]
    )
    assert len(metric_lines(trained, "valid_iid")) == 2
    assert any("tfevents" in name for name in files_under(trained / "tensorboard"))


def test_a_finished_run_stays_as_it_is(trained: Path, dataset: str, tmp_path: Path) -> None:
    before = (trained / "metrics.jsonl").read_text()
    config = write_config(tmp_path / "small.yaml", dataset, trained)
    assert main(["train", config]) == 0
    assert (trained / "metrics.jsonl").read_text() == before


def test_keeps_the_newest_and_the_best(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(
        dataset,
        tmp_path / "run",
        checkpoint={"every_steps": 2, "keep": 2},
        train={"epochs": 3, "batch": 1024},
    )
    trainer = new_trainer(config, world)
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
    trainer = new_trainer(config, world)
    trainer.fit(None)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    torn = newest.parent / "step-00000999"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    assert [c.step for c in trainer.checkpoints.committed()] == [trainer.progress.step]
    trainer.checkpoints.prune(1, None)
    assert not torn.exists() and newest.exists()


def test_stops_early_when_validation_does_not_improve(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(
        dataset,
        tmp_path,
        tables={"optimizer": "sgd", "lr": 1e-12},
        train={"epochs": 50, "patience": 2, "evaluations_per_epoch": 2},
    )
    trainer = new_trainer(config, world)
    trainer.fit(None)
    assert trainer.finished and trainer.progress.evaluations_since_best == 2
    assert trainer.progress.step < 3 * trainer._plan.steps


def test_a_model_that_is_not_finite_is_never_saved(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(
        dataset,
        tmp_path / "run",
        tables={"optimizer": "sgd", "lr": 1e30},
        train={"log_every": 1000},
        checkpoint={"every_steps": 1},
    )
    with pytest.raises(UserError, match="diverged"):
        train(config)
    trainer = new_trainer(config, world)
    assert trainer.resume()
    tables, dense = everything(trainer, world)
    assert all(torch.isfinite(tensor).all() for tensor in tables.values())
    assert all(torch.isfinite(value).all() for entry in dense.values() for value in entry.values())
