"""Preemption, lost peers and steps that are not finite: what all ranks do together."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.world import Vote, World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.training.loop import Trainer
from tests.support.processes import (
    is_deaf,
    long_training,
    rank_process,
    started,
    torchrun_words,
    wait_for,
)
from tests.support.ranks import run_ranks
from tests.support.runs import committed_steps, logged_steps
from tests.support.small import small_config
from tests.support.trainers import assert_same, everything, new_trainer, train_steps


def test_sigterm_checkpoints_the_step_and_says_so_by_its_exit_code(
    dataset: str, tmp_path: Path
) -> None:
    run, words = long_training(dataset, tmp_path)
    with started(*words) as process:
        wait_for(lambda: logged_steps(run))
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert error.count("\n") == 1 and "preempted: checkpointed at step" in error
    newest = committed_steps(run)[-1]
    assert f"at step {newest};" in error
    assert logged_steps(run)[-1] == newest  # nothing was trained beyond what is saved


@pytest.mark.distributed
def test_ranks_stop_at_the_same_step_when_one_of_them_is_asked(
    dataset: str, tmp_path: Path
) -> None:
    run, words = long_training(dataset, tmp_path)
    with started(*torchrun_words(*words)) as process:
        wait_for(lambda: len(logged_steps(run)) > 3)
        rank_process(process, 1).send_signal(signal.SIGTERM)
        error = process.communicate(timeout=90)[1]
    assert "preempted: checkpointed at step" in error
    assert committed_steps(run)[-1] == logged_steps(run)[-1]


@pytest.mark.parametrize(
    ("pauses", "why"),
    [
        ((0.0,), "run.grace_seconds (3 s) are over: left at once"),
        ((0.0, 0.2), "run.grace_seconds (3 s) are over: left at once"),
        ((0.0, 0.2, 1.2), "a second SIGTERM: left at once"),
    ],
)
def test_what_cannot_stop_ends_after_the_grace_or_a_second_sigterm_but_not_an_echo(
    pauses: tuple[float], why: str
) -> None:
    with started("-c", "from tests.support.processes import hang; hang(3)") as process:
        wait_for(lambda: is_deaf(process.pid))
        for pause in pauses:
            time.sleep(pause)
            process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and why in error


def test_a_killed_process_harms_nothing(dataset: str, tmp_path: Path) -> None:
    run, words = long_training(dataset, tmp_path)
    with started(*words) as process:
        wait_for(lambda: committed_steps(run))
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
    again = subprocess.run(
        [sys.executable, *words, "train.max_steps=1"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr


def _vote(answers: list[list[bool]]) -> list[bool]:
    world = join_world(60)
    vote = Vote(world)
    return [vote.any(row[world.rank]) for row in answers]


@pytest.mark.distributed
def test_a_vote_is_known_to_all_one_step_later() -> None:
    answers = [[False, False], [False, True], [False, False], [True, True], [False, False]]
    for rank in run_ranks(2, _vote, answers):
        assert rank == [False, False, True, False, True]


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_is_named(dataset: str, tmp_path: Path, how: signal.Signals) -> None:
    """Also while torchrun, which sees a dead rank at once, sends SIGTERM to the other ranks."""
    run, words = long_training(dataset, tmp_path)
    words += ["run.timeout_seconds=6", "run.retry_seconds=2"]
    with started(*torchrun_words("--monitor-interval", "0.1", *words)) as process:
        wait_for(lambda: logged_steps(run))
        peer = rank_process(process, 1)
        peer.send_signal(how)
        error = next(line for line in process.stderr or () if "cnsdiff: error" in line)
        with suppress(psutil.NoSuchProcess):
            peer.kill()  # a stopped one outlives its launcher
    assert "cnsdiff: error [rank 0]: lost rank 1 on" in error
    assert "run again to go on" in error


def _poisoned(trainer: Trainer, at: set[int], rank: int, how: str) -> Trainer:
    """Make the loss, or only the gradient, of one rank not finite at some steps."""
    rank_loss = trainer.step._rank

    def poison(*words: Any) -> Any:
        loss, hardness = rank_loss(*words)
        if trainer.progress.step in at and trainer.world.rank == rank:
            if how == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, hardness

    trainer.step._rank = poison  # type: ignore[method-assign]
    return trainer


def _skip_steps(config: Config, at: set[int], rank: int, how: str, end: int) -> Any:
    world = join_world(60)
    trainer = _poisoned(new_trainer(config, world), at, rank, how)
    _run(trainer, set(range(end)))
    return *everything(trainer, world), trainer.progress.skipped


def _run(trainer: Trainer, steps: set[int]) -> None:
    """Take some steps of the first epoch and leave the others out."""
    for ready in trainer.loader.steps(0):
        if ready.batch.step in steps:
            trainer.take_step(ready)
        trainer.progress.step += 1


SKIP = {"non_finite": "skip"}


@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize(
    "generator",
    [{"zero_stage": stage} for stage in (0, 1, 2, 3)] + [{"zero_stage": 1, "precision": "bf16"}],
    ids=lambda generator: "-".join(map(str, generator.values())),
)
def test_a_skipped_step_leaves_no_trace(
    dataset: str, tmp_path: Path, world: World, generator: dict[str, Any], how: str
) -> None:
    config = small_config(dataset, tmp_path, train=SKIP, generator=generator)
    without = new_trainer(config, world)
    _run(without, {0, 1, 4, 5})
    *found, skipped = _skip_steps(config, {2, 3}, 0, how, 6)
    assert skipped == 2
    assert_same((*found, {}), (*everything(without, world), {}), exact=True)


@pytest.mark.distributed
def test_all_ranks_skip_what_one_cannot_take(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path, train=SKIP, generator={"zero_stage": 2})
    first, second = run_ranks(2, _skip_steps, config, {2}, 1, "gradient", 4)
    assert first[2] == second[2] == 1
    assert_same((*first[:2], {}), (*second[:2], {}), exact=True)
    assert all(torch.isfinite(table).all() for table in first[0].values())


def _stop(config: Config, rank: int) -> str:
    trainer = _poisoned(new_trainer(config, join_world(60)), {3}, rank, "loss")
    with pytest.raises(UserError) as stopped:
        trainer.fit(None)
    return str(stopped.value)


@pytest.mark.distributed
def test_by_default_all_ranks_stop_and_name_the_one(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = run_ranks(2, _stop, small_config(dataset, tmp_path / "run"), 1)
    assert lines[0] == lines[1]
    assert "loss or gradient of rank 1 is not a finite number at step 3" in lines[0]


def test_a_run_that_only_skips_ends(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(dataset, tmp_path / "run", train=SKIP)
    trainer = _poisoned(new_trainer(config, world), set(range(100)), 0, "loss")
    with pytest.raises(UserError, match="not a finite number at step 9"):
        trainer.fit(None)


def test_a_loss_that_explodes_ends_the_run(dataset: str, tmp_path: Path, world: World) -> None:
    train = {"max_growth": 3.0, "log_every": 1, "epochs": 20}
    tables = {"optimizer": "sgd", "lr": 1e-6}
    config = small_config(dataset, tmp_path / "run", train=train, tables=tables)
    trainer = new_trainer(config, world)
    rank_loss = trainer.step._rank

    def explode(*words: Any) -> Any:
        loss, hardness = rank_loss(*words)
        return loss * (100.0 if trainer.progress.step > 15 else 1.0), hardness

    trainer.step._rank = explode  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"diverged: the loss is .*max_growth.* at step 17"):
        trainer.fit(None)


def test_the_count_of_skipped_steps_is_kept(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path / "run", train=SKIP, checkpoint={"every_steps": 1})
    whole = train_steps(config, None)
    assert whole[2]["skipped"] == 0 and whole[2]["first_loss"] > 0
