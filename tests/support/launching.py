"""Trainings under launch/torchrun.sh or another script of launch/, on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import kill_tree
from tests.support.runs import committed_steps
from tests.support.saved_state import distance, read_checkpoint
from tests.support.small import write_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "torchrun.sh")


def written_config(dataset: str, folder: Path, run: str, **train: Any) -> str:
    """Write the config of a training that up to four ranks may share; returns its path."""
    sections = {"train": train, "checkpoint": {"every_steps": 5}}
    return write_config(folder / f"{run}.yaml", dataset, folder / run, **sections)


@contextmanager
def launched(
    *words: str, script: str = SCRIPT, prefix: list[str] | None = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a script, and kill what it started if it still runs at the end.

    Args:
        prefix: words before the script's name, such as those of a network namespace.
        environment: the variables that a cluster sets for torchrun.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [*(prefix or []), script, *words],
        cwd=ROOT,
        text=True,
        start_new_session=True,
        env={**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.communicate()


def ended(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str]:
    """Wait for the end; the exit code, and stdout and stderr together."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def until(what: Callable[[], Any], agent: subprocess.Popen[str]) -> Any:
    """Call ``what`` until it returns something true, and return that; the agent must live."""
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert agent.poll() is None, agent.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def until_trained(run: Path, agent: subprocess.Popen[str]) -> None:
    until(lambda: any((run / "checkpoints").glob("step-*/commit.json")), agent)


def assert_same_training(one: Path, other: Path) -> None:
    """Two runs of the same world size have the same last checkpoint, to the bit."""
    name = f"checkpoints/step-{committed_steps(one)[-1]:08d}"
    (state, progress), (found, found_progress) = (
        read_checkpoint(run / name) for run in (one, other)
    )
    assert progress == found_progress and state.keys() == found.keys()
    assert {name: distance(state[name], found[name]) for name in state} == dict.fromkeys(state, 0)
