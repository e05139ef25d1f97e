"""Preemption, lost peers, and steps that are not finite: what all ranks do together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.world import Vote, World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.training.loop import Trainer
from tests.support.ranks import run_ranks
from tests.support.small import small_config
from tests.training.test_train import _assert_same, _everything, _train_steps, _trainer


def _long(dataset: str, folder: Path, **sections: dict[str, Any]) -> tuple[Path, list[str]]:
    """The run directory and the command of a training that goes on for long."""
    train = {"epochs": 3000, "patience": 10**6, "log_every": 1}
    tree = small_config(dataset, folder / "run", train=train, **sections).model_dump(mode="json")
    (folder / "long.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run", ["-m", "cnsdiff_dist", "train", str(folder / "long.yaml")]


@contextmanager
def _started(*words: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _torchrun(*words: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]


def _wait(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _logged(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if record["kind"] == "train"]


def _committed(run: Path) -> list[int]:
    return sorted(int(p.parent.name[5:]) for p in run.glob("checkpoints/*/commit.json"))


# --- preemption -----------------------------------------------------------------------------


def test_sigterm_checkpoints_the_step_and_says_so_by_its_exit_code(
    dataset: str, tmp_path: Path
) -> None:
    run, words = _long(dataset, tmp_path)
    with _started(*words) as process:
        _wait(lambda: _logged(run))
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert error.count("\n") == 1 and "preempted: checkpointed at step" in error
    newest = _committed(run)[-1]
    assert f"at step {newest};" in error
    assert _logged(run)[-1] == newest  # nothing was trained beyond what is saved


@pytest.mark.distributed
def test_ranks_stop_at_the_same_step_when_one_of_them_is_asked(
    dataset: str, tmp_path: Path
) -> None:
    run, words = _long(dataset, tmp_path)
    with _started(*_torchrun(*words)) as process:
        _wait(lambda: len(_logged(run)) > 3)
        _rank(process, 1).send_signal(signal.SIGTERM)
        error = process.communicate(timeout=90)[1]
    assert "preempted: checkpointed at step" in error
    assert _committed(run)[-1] == _logged(run)[-1]


def _rank(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    ranks = psutil.Process(agent.pid).children()
    (found,) = (child for child in ranks if child.environ().get("RANK") == str(rank))
    return found


def _hang(grace: int, asked: bool = False) -> None:
    """A main thread that is deaf: as in a collective whose peer is gone."""
    from cnsdiff_dist.training.preemption import Preemption

    with Preemption(grace) as preemption:
        preemption.watch()
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=True)


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
    with _started("-c", "from tests.training.test_survival import _hang; _hang(3)") as process:
        _wait(lambda: _is_deaf(process.pid))
        for pause in pauses:
            time.sleep(pause)
            process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and why in error


def _is_deaf(pid: int) -> bool:
    """Whether ``_hang`` has come to where it waits: it listens for a peer that never comes."""
    return any(c.status == "LISTEN" for c in psutil.Process(pid).net_connections())


def test_a_killed_process_harms_nothing(dataset: str, tmp_path: Path) -> None:
    run, words = _long(dataset, tmp_path)
    with _started(*words) as process:
        _wait(lambda: _committed(run))
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


# --- peers ----------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_peer_is_named(dataset: str, tmp_path: Path, how: signal.Signals) -> None:
    """Also while torchrun, which sees a dead rank at once, sends the others SIGTERM."""
    run, words = _long(dataset, tmp_path)
    words += ["run.timeout_seconds=6", "run.retry_seconds=2"]
    with _started(*_torchrun("--monitor-interval", "0.1", *words)) as process:
        _wait(lambda: _logged(run))
        peer = _rank(process, 1)
        peer.send_signal(how)
        error = next(line for line in process.stderr or () if "cnsdiff: error" in line)
        with suppress(psutil.NoSuchProcess):
            peer.kill()  # a stopped one outlives its launcher
    assert "cnsdiff: error [rank 0]: lost rank 1 on" in error
    assert "run again to go on" in error


# --- steps that are not finite --------------------------------------------------------------


def _poisoned(trainer: Trainer, at: set[int], rank: int, how: str) -> Trainer:
    """At some steps the loss, or only the gradient, of one rank is not a number."""
    rank_loss = trainer._rank

    def poison(*words: Any) -> Any:
        loss, hardness = rank_loss(*words)
        if trainer.progress.step in at and trainer.world.rank == rank:
            if how == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, hardness

    trainer._rank = poison  # type: ignore[method-assign]
    return trainer


def _skip_steps(config: Config, at: set[int], rank: int, how: str, end: int) -> Any:
    world = join_world(60)
    trainer = _poisoned(_trainer(config, world), at, rank, how)
    _run(trainer, set(range(end)))
    return *_everything(trainer, world), trainer.progress.skipped


def _run(trainer: Trainer, steps: set[int]) -> None:
    """Some steps of the first epoch; the others are never taken."""
    for ready in trainer.loader.steps(0):
        if ready.batch.step in steps:
            trainer.step(ready)
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
    without = _trainer(config, world)
    _run(without, {0, 1, 4, 5})
    *found, skipped = _skip_steps(config, {2, 3}, 0, how, 6)
    assert skipped == 2
    _assert_same((*found, {}), (*_everything(without, world), {}), exact=True)


@pytest.mark.distributed
def test_all_ranks_skip_what_one_cannot_take(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path, train=SKIP, generator={"zero_stage": 2})
    first, second = run_ranks(2, _skip_steps, config, {2}, 1, "gradient", 4)
    assert first[2] == second[2] == 1
    _assert_same((*first[:2], {}), (*second[:2], {}), exact=True)
    assert all(torch.isfinite(table).all() for table in first[0].values())


def _stop(config: Config, rank: int) -> str:
    trainer = _poisoned(_trainer(config, join_world(60)), {3}, rank, "loss")
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
    trainer = _poisoned(_trainer(config, world), set(range(100)), 0, "loss")
    with pytest.raises(UserError, match="not a finite number at step 9"):
        trainer.fit(None)


def test_a_loss_that_explodes_ends_the_run(dataset: str, tmp_path: Path, world: World) -> None:
    config = small_config(
        dataset, tmp_path / "run", train={"max_growth": 3.0, "log_every": 1, "epochs": 20},
        tables={"optimizer": "sgd", "lr": 1e-6},
    )  # fmt: skip
    trainer = _trainer(config, world)
    rank_loss = trainer._rank
    trainer._rank = lambda *words: (  # type: ignore[method-assign]
        rank_loss(*words)[0] * (100.0 if trainer.progress.step > 15 else 1.0), rank_loss(*words)[1]
    )  # fmt: skip
    with pytest.raises(UserError, match=r"diverged: the loss is .*max_growth.* at step 17"):
        trainer.fit(None)


def test_the_count_of_skipped_steps_is_kept(dataset: str, tmp_path: Path) -> None:
    config = small_config(dataset, tmp_path / "run", train=SKIP, checkpoint={"every_steps": 1})
    whole = _train_steps(config, None)
    assert whole[2]["skipped"] == 0 and whole[2]["first_loss"] > 0
