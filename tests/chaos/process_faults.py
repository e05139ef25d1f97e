"""Faults of processes: ranks and their agent are killed, stopped or asked to end."""

import os
import signal
import time
from contextlib import suppress

import psutil

from tests.chaos.invariants import Calm
from tests.chaos.job import Job
from tests.chaos.lab import TIMEOUT_SECONDS, Lab
from tests.chaos.scenario import Scenario, kill_a_rank, outlived

_ORPHAN_SECONDS = 20  # how long ranks may outlive the first step of their successors
_RANK_START = 6.0  # seconds, about, that a rank takes to its first step


class KillRank(Scenario):
    """SIGKILL to any rank at any moment, at times also to one that is still starting."""

    name, times = "kill-rank", 1_000_000

    def epochs_of(self, lab: Lab) -> int:
        return 8 + 2 * self.count(lab)

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        kills = self.count(lab)
        while job.disturbances < kills and job.go_on(lab.rng.uniform(0, 1.2)):
            early = lab.rng.random() < 0.2 and job.disturbances + 1 < kills
            if not job.recover(lambda: self._kill(lab, job, early)):  # noqa: B023  (called now)
                return

    def _kill(self, lab: Lab, job: Job, early: bool) -> None:
        old = {rank.pid for rank in job.ranks()}
        kill_a_rank(lab, job)
        if early:
            job.until(lambda: bool({rank.pid for rank in job.ranks()} - old))
            job.go_on(lab.rng.uniform(0, _RANK_START))
            job.disturbances += 1
            kill_a_rank(lab, job)


class KillInCheckpoint(Scenario):
    """SIGKILL while a checkpoint is written, and right after it was committed, by turns."""

    name, times = "kill-in-checkpoint", 8

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        torn = 0
        for index in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(0, 0.5)):
                return
            # Chosen ahead, because looking for processes takes longer than a checkpoint.
            ranks = job.wait_for_ranks()
            victims = ranks if lab.rng.random() < 0.5 else [lab.rng.choice(ranks)]
            moment = self._after if index % 2 else self._during
            if not (moment(job) and job.recover(lambda: self._kill(victims, job))):  # noqa: B023
                return
            torn += self._left
        job.notes.append(f"{torn} checkpoints were left without a commit")

    def _kill(self, victims: list[psutil.Process], job: Job) -> None:
        for rank in victims:
            os.kill(rank.pid, signal.SIGKILL)
        time.sleep(0.1)  # long enough for the rest of the write, had it gone on
        self._left = bool(job.run.unfinished())

    def _during(self, job: Job) -> bool:
        # What the last kill left is there until the next commit.
        none = job.until(lambda: not job.run.unfinished(), what="the end of debris")
        return none and job.until(
            lambda: bool(job.run.unfinished()), what="a checkpoint", pause=0.0005
        )

    def _after(self, job: Job) -> bool:
        before = {commit.step for commit in job.run.commits()}

        def new() -> bool:
            return bool({commit.step for commit in job.run.commits()} - before)

        return job.until(new, what="a commit", pause=0.0005)


class KillAgent(Scenario):
    """SIGKILL to torchrun itself, and the command again: the old ranks must soon be gone, and
    until then do no harm."""

    name, times = "kill-agent", 2
    step_seconds = 0.2  # else the old ranks finish the training before the new ones have begun

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        job.overlaps = True
        for _ in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(0, 1.2)):
                return
            ranks, killed = job.ranks(), time.monotonic()
            there = job.recover(job.nodes[0].agent.kill)
            alive = outlived(ranks, _ORPHAN_SECONDS)
            for rank in alive:
                rank.kill()
            outlived(alive, 10)
            seconds = time.monotonic() - killed
            if alive:
                job.problems.append(f"{len(alive)} ranks outlived their agent by {seconds:.0f} s")
            else:
                job.notes.append(f"the old ranks were gone {seconds:.0f} s after their agent")
            if not there:
                return


class StopRank(Scenario):
    """SIGSTOP: first for a moment, then for longer than the others wait."""

    name, times = "stop-rank", 2

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        job.go_on(lab.rng.uniform(0, 1))
        rank = lab.rng.choice(job.wait_for_ranks())
        job.disturbances += 1
        rank.suspend()
        job.go_on(3)
        if not job.outlast(rank.resume):
            return
        if job.launches > 1 or len(job.watcher.attempts()) > 2:
            job.problems.append("a pause of 3 s was not ridden out")
        rank = lab.rng.choice(job.wait_for_ranks())
        try:
            job.recover(rank.suspend, TIMEOUT_SECONDS + 120)
        finally:
            with suppress(psutil.Error):
                rank.resume()


class Sigterm(Scenario):
    """SIGTERM to torchrun: stop at a step all agree on, and retrain nothing afterwards."""

    name = "sigterm"

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        for _ in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(0, 1.5)):
                return
            before = job.watcher.attempts()
            stopped: list[int] = []
            if not job.recover(lambda: stopped.append(self._stop(job, calm))):  # noqa: B023
                return
            new = min(job.watcher.attempts() - before)
            first = calm.global_step(job.watcher.lines()[new][0])
            if first != stopped[0]:
                job.problems.append(f"stopped before step {stopped[0]}, went on from {first}")
        self._while_starting(lab, job)

    def _stop(self, job: Job, calm: Calm) -> int:
        """Stop the training and return the step that comes next."""
        node, ranks = job.nodes[0], job.ranks()
        assert node.agent is not None
        started = time.monotonic()
        node.agent.send_signal(signal.SIGTERM)
        code = node.agent.wait(90)
        job.notes.append(f"ended in {time.monotonic() - started:.1f} s, torchrun's code {code}")
        if outlived(ranks, 1):
            job.problems.append("a rank outlived torchrun's SIGTERM")
        lines = [line for lines in job.watcher.lines().values() for line in lines]
        return max(calm.global_step(line) for line in lines) + 1

    def _while_starting(self, lab: Lab, job: Job) -> None:
        def twice() -> None:
            self._terminate(job)
            job.go_on(lab.rng.uniform(1, _RANK_START))
            self._terminate(job)

        job.recover(twice)

    def _terminate(self, job: Job) -> None:
        agent = job.nodes[0].agent
        if agent is not None:
            agent.send_signal(signal.SIGTERM)
            agent.wait(90)
