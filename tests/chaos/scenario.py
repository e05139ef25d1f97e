"""What a scenario is, and the means that several scenarios share."""

import time
from contextlib import ExitStack, suppress

import psutil

from tests.chaos.invariants import Calm
from tests.chaos.job import Job
from tests.chaos.lab import Lab
from tests.chaos.store import LocalRun


class Scenario:
    """A training and the faults that disturb it."""

    name = ""
    exact = True  # the world keeps its size, so the result equals the calm run's to the bit
    times = 3  # faults, unless `--kills` is less
    epochs = 30
    step_seconds = 0.03

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        return lab.job(self.name, LocalRun(lab.folder / self.name / "run"), self.epochs_of(lab))

    def epochs_of(self, lab: Lab) -> int:
        return self.epochs

    def count(self, lab: Lab) -> int:
        return min(self.times, lab.kills)

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        raise NotImplementedError


def kill_a_rank(lab: Lab, job: Job) -> None:
    with suppress(psutil.Error):
        lab.rng.choice(job.wait_for_ranks()).kill()


def outlived(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes that still run after so many seconds; a zombie does not count."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return alive


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
