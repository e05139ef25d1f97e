"""Interrupted trainings: what a resumed run learns is what an uninterrupted one learns."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.directory import _check_same
from tests.support.ranks import run_ranks
from tests.support.runs import metric_lines
from tests.support.small import small_config, write_config
from tests.support.trainers import EVERY_3, assert_same, new_trainer, train_steps


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
    whole = train_steps(small_config(dataset, tmp_path / "whole", **sections), None)
    cut = small_config(dataset, tmp_path / "cut", checkpoint=EVERY_3, **sections)
    assert train_steps(cut, 7) is None
    assert train_steps(cut, 10) is None
    assert_same(train_steps(cut, None), whole, exact=True)


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
    alone = train_steps(small_config(dataset, tmp_path / "alone", **sections), None)
    config = small_config(dataset, tmp_path / "two", **sections)
    for rank in run_ranks(2, train_steps, config, None):
        assert_same(rank, alone, exact=False)


@pytest.mark.distributed
def test_a_run_resumes_at_another_world_size(dataset: str, tmp_path: Path) -> None:
    whole = train_steps(small_config(dataset, tmp_path / "whole", train={"epochs": 1}), None)
    config = small_config(dataset, tmp_path / "cut", checkpoint=EVERY_3, train={"epochs": 1})
    assert run_ranks(2, train_steps, config, 5) == [None, None]
    assert_same(train_steps(config, None), whole, exact=False)


@pytest.mark.distributed
def test_a_run_resumes_under_another_sharding_and_zero_stage(dataset: str, tmp_path: Path) -> None:
    def config(run: str, **sections: dict[str, Any]) -> Any:
        train_section = {"checkpoint": EVERY_3, "train": {"epochs": 1}}
        return small_config(dataset, tmp_path / run, **train_section, **sections)

    whole, first = train_steps(config("whole"), None), config("cut")
    assert run_ranks(2, train_steps, first, 5) == [None, None]
    other = config("cut", tables={"sharding": "table_wise"}, generator={"zero_stage": 3})
    _check_same(first, other, "config.yaml")  # `cnsdiff train` lets it pass
    for rank in run_ranks(2, train_steps, other, None):
        assert_same(rank, whole, exact=False)


def test_a_run_killed_while_it_trains_is_continued_by_the_same_command(
    dataset: str, tmp_path: Path
) -> None:
    sections = {"checkpoint": {"every_steps": 2}, "train": {"epochs": 60, "patience": 99}}
    config = write_config(tmp_path / "small.yaml", dataset, tmp_path / "run", **sections)
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
    steps = [line["step"] for line in metric_lines(run, "train")]
    assert steps == sorted(set(steps))  # nothing is logged twice


def test_an_epoch_is_not_resumed_in_another_order(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(dataset, tmp_path / "run", checkpoint={"every_steps": 5})
    steps = new_trainer(config, world)._plan.steps
    assert steps % 5 and train_steps(config, steps + 4) is None
    monkeypatch.setattr("cnsdiff_dist.training.loop.ROW_ORDER", 2)
    before = (tmp_path / "run/checkpoints/owner.json").read_bytes()
    with pytest.raises(UserError, match="took the rows in another order; finish its epoch"):
        new_trainer(config, world).resume()
    assert (tmp_path / "run/checkpoints/owner.json").read_bytes() == before
    for newer in list((tmp_path / "run/checkpoints").iterdir()):
        if newer.name > f"step-{steps:08d}":
            shutil.rmtree(newer)
    trainer = new_trainer(config, world)
    assert trainer.resume() and trainer.progress.step == steps
    assert trainer.progress.row_order == 2


def test_resuming_restores_all_of_the_progress(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(
        dataset, tmp_path / "run", tables={"optimizer": "sgd", "lr": 1e-12}, train={"epochs": 3}
    )
    trainer = new_trainer(config, world)
    trainer.fit(None)
    again = new_trainer(config, world)
    again.resume()
    assert again.progress == trainer.progress
    assert again.progress.evaluations_since_best == 2 and again.progress.best > 0
