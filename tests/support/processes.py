"""Trainings in processes of their own: started, watched from outside, killed."""

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
import torch

from cnsdiff_dist.training.preemption import Preemption
from tests.support.small import write_config


def long_training(dataset: str, folder: Path, **sections: dict[str, Any]) -> tuple[Path, list[str]]:
    """The run directory and the command of a training that goes on for long."""
    train = {"epochs": 3000, "patience": 10**6, "log_every": 1}
    run = folder / "run"
    config = write_config(folder / "long.yaml", dataset, run, train=train, **sections)
    return run, ["-m", "cnsdiff_dist", "train", config]


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python with these words; kill it and its children if it still runs at the end."""
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started.

    A rank has a session of its own, and does not end with its agent while Python still starts: it
    would keep the pipes of the test open for ever.
    """
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        parent.suspend()  # it starts nothing more
        for process in [*parent.children(recursive=True), parent]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def torchrun_words(*words: str) -> list[str]:
    """The command that starts two ranks of what ``words`` say."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]


def wait_for(what: Callable[[], Any]) -> Any:
    """Call ``what`` until it returns something true, and return that."""
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def rank_process(agent: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of one rank under a torchrun agent."""
    ranks = psutil.Process(agent.pid).children()
    (found,) = (child for child in ranks if child.environ().get("RANK") == str(rank))
    return found


def hang(grace: int, asked: bool = False) -> None:
    """Block the main thread for ever, as a collective does whose peer is gone."""
    with Preemption(grace) as preemption:
        preemption.watch()
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        torch.distributed.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=True)


def is_deaf(pid: int) -> bool:
    """Return whether ``hang`` has blocked: it then listens for a peer that never comes."""
    return any(c.status == "LISTEN" for c in psutil.Process(pid).net_connections())
