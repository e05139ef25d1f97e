"""Faults of a machine: a flipped byte, a clock that jumps, a full disk."""

import json
import os
import subprocess
import time
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

from tests.chaos.invariants import Calm
from tests.chaos.job import Job
from tests.chaos.lab import Lab
from tests.chaos.scenario import Scenario, kill_a_rank, outlived
from tests.chaos.store import LocalRun, distcp_files, folder_of

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class Damage(Scenario):
    """A byte of the newest checkpoint flips: the one before it is used, and a line says so."""

    name, times = "damage", 2

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        for _ in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(1, 2)):
                return
            damaged: list[int] = []
            before = job.watcher.attempts()
            if not job.recover(lambda: damaged.append(self._damage(job))):  # noqa: B023
                return
            first = min(
                calm.global_step(lines[0])
                for attempt, lines in job.watcher.lines().items()
                if attempt not in before
            )
            if first >= damaged[0]:
                job.problems.append(f"went on from {first} though {damaged[0]} is damaged")
            if not self._is_said(job, damaged[0]):
                job.problems.append(f"no line says that checkpoint {damaged[0]} is damaged")

    def _damage(self, job: Job) -> int:
        assert isinstance(job.run, LocalRun)
        ranks = job.ranks()
        for rank in ranks:
            rank.kill()
        outlived(ranks, 10)
        newest = max(commit.step for commit in job.run.commits())
        job.watcher.damage(newest)
        file = max(distcp_files(job.run.folder / folder_of(newest)), key=lambda f: f.stat().st_size)
        with file.open("r+b") as handle:
            handle.seek(file.stat().st_size // 2)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 0x10]))
        return newest

    def _is_said(self, job: Job, step: int) -> bool:
        name = folder_of(step).rpartition("/")[2]
        words = ("damage", "corrupt", "checksum", "digest", "sha256", "unreadable", "cannot")
        return any(
            name in line and any(word in line.lower() for word in words)
            for line in job.log.read_text().splitlines()
        )


class ClockJumps(Scenario):
    """The ranks' wall clock jumps by hours, back and forth; the monotonic one does not."""

    name, times = "clock", 4
    epochs = 15  # a step takes long under libfaketime

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        folder = lab.folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        self._set(folder, "+0")
        prefix = [
            "env",
            f"LD_PRELOAD={FAKETIME}",
            f"FAKETIME_TIMESTAMP_FILE={folder}/clock",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "FAKETIME_CACHE_DURATION=1",
        ]
        return lab.job(self.name, LocalRun(folder / "run"), self.epochs_of(lab), rank_prefix=prefix)

    def _set(self, folder: Path, offset: str) -> None:
        (folder / "clock.new").write_text(offset + "\n")
        (folder / "clock.new").replace(folder / "clock")

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        for _ in range(self.count(lab)):
            hours = lab.rng.randint(1, 30) * lab.rng.choice([-1, 1])
            job.disturbances += 1
            self._set(job.folder, f"{hours:+d}h")
            if not job.go_on(lab.rng.uniform(2, 3)):
                return
        if len(job.watcher.attempts()) > 2:
            job.problems.append("a jump of the clock ended a rank")
        job.recover(lambda: kill_a_rank(lab, job))
        times = [json.loads(line)["time"] for line in (job.run.folder / "metrics.jsonl").open()]
        if not any(abs(b - a) > 1800 for a, b in pairwise(times)):
            job.problems.append("the ranks did not see the clock jump: this tested nothing")


class DiskFull(Scenario):
    """The run's disk fills up, and after a while there is space again."""

    name, times = "disk-full", 2

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        disk = lab.folder / self.name / "disk"
        disk.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "chaos", str(disk)]
        subprocess.run(mount, check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)
        return lab.job(self.name, LocalRun(disk / "run"), self.epochs_of(lab))

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        ballast = job.run.folder.parent / "ballast"
        for _ in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(0, 1.5)):
                return
            job.disturbances += 1
            self._fill(ballast)
            end = time.monotonic() + lab.rng.uniform(4, 8)
            # Pruning frees space meanwhile, which is taken again.
            if not job.until(lambda: self._fill(ballast) or time.monotonic() > end, pause=0.1):  # noqa: B023
                return
            if not job.outlast(ballast.unlink):
                return

    def _fill(self, ballast: Path) -> None:
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
