"""The faults: each scenario is one kind of trouble and what it needs to be made."""

import json
import os
import signal
import subprocess
import time
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path

import psutil

from tests.chaos.invariants import Calm
from tests.chaos.job import Job, Node
from tests.chaos.lab import TIMEOUT_SECONDS, Lab
from tests.chaos.network import TwoNodes
from tests.chaos.proxy import Proxy, Weather
from tests.chaos.store import BucketRun, LocalRun, distcp_files, folder_of
from tests.support.s3server import S3Server

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
_ORPHAN_SECONDS = 20  # how long ranks may outlive the first step of their successors
_RANK_START = 6.0  # seconds, about, that a rank takes to its first step


class Scenario:
    """A training, and what is done to it until nothing more is."""

    name = ""
    exact = True  # the world keeps its size, so the result is the calm run's to the bit
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
    """Those that still run after so long; one that nobody has reaped yet does not."""
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
            # Chosen ahead: looking for processes takes longer than a checkpoint.
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
        # What the last kill left is still there, until the next commit.
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
        """Returns the step that comes next."""
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
            "env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME_TIMESTAMP_FILE={folder}/clock",
            "FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_CACHE_DURATION=1",
        ]  # fmt: skip
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
            # What is freed meanwhile, by pruning, is taken again.
            if not job.until(lambda: self._fill(ballast) or time.monotonic() > end, pause=0.1):  # noqa: B023
                return
            if not job.outlast(ballast.unlink):
                return

    def _fill(self, ballast: Path) -> None:
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass


class BucketScenario(Scenario):
    """Dataset and run are in a bucket."""

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        server = self._server(lab, stack)
        run = BucketRun(server, "chaos/run")
        options = {"environment": server.environment(self._port(lab, server, stack))}
        return lab.job(self.name, run, self.epochs_of(lab), "s3://chaos/data", **options)

    def _port(self, lab: Lab, server: S3Server, stack: ExitStack) -> int:
        return server.port

    def _server(self, lab: Lab, stack: ExitStack) -> S3Server:
        folder = lab.folder / self.name / "s3"
        folder.mkdir(parents=True, exist_ok=True)
        server = S3Server(folder)
        stack.callback(server.stop)
        server.start()
        server.create_bucket("chaos")
        server.filesystem().put(str(lab.dataset) + "/", "chaos/data/", recursive=True)
        return server


class BucketKillRank(BucketScenario, KillRank):
    """As kill-rank, but dataset and run are in a bucket."""

    name, times = "s3-kill-rank", 5


class BucketIsAway(BucketScenario):
    """The S3 server is away for some seconds; ``leave`` and ``come`` say how."""

    times = 3
    seconds = (0.0, 0.0)

    def leave(self, server: S3Server) -> None:
        raise NotImplementedError

    def come(self, server: S3Server) -> None:
        raise NotImplementedError

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        server = job.run.server
        for _ in range(self.count(lab)):
            if not job.go_on(lab.rng.uniform(0, 1.5)):
                return
            job.disturbances += 1
            self.leave(server)
            try:
                there = job.go_on(lab.rng.uniform(*self.seconds))
            finally:
                self.come(server)
            if not (there and job.outlast(lambda: None)):
                return
        job.notes.append(f"{len(job.watcher.attempts()) - 2} processes began anew")


class BucketPauses(BucketIsAway):
    """The S3 server keeps its connections and answers nothing for a while."""

    name, seconds = "s3-pause", (3, 10)

    def leave(self, server: S3Server) -> None:
        server.pause()

    def come(self, server: S3Server) -> None:
        server.resume()


class BucketDies(BucketIsAway):
    """The S3 server is killed, and after a while started again on the same directory."""

    name, seconds = "s3-kill", (1, 8)

    def leave(self, server: S3Server) -> None:
        server.kill()

    def come(self, server: S3Server) -> None:
        server.start()
        server.create_bucket("chaos")  # returns once it answers


class BadNetwork(BucketScenario):
    """Requests to the bucket are slow, are reset, and get little bandwidth."""

    name = "s3-network"

    def _port(self, lab: Lab, server: S3Server, stack: ExitStack) -> int:
        self._proxy = Proxy(server.port, lab.rng.randrange(2**31))
        stack.callback(self._proxy.stop)
        return self._proxy.port

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        weathers = [
            Weather(latency=0.1), Weather(reset_chance=0.05), Weather(bytes_per_second=100_000),
            Weather(0.03, 0.02, 400_000),
        ]  # fmt: skip
        for weather in weathers[-self.count(lab) - 1 :]:
            job.disturbances += 1
            self._proxy.weather = weather
            if not job.go_on(10):
                break
        self._proxy.weather = Weather()
        job.outlast(lambda: None)
        anew = len(job.watcher.attempts()) - 2
        job.notes.append(f"{self._proxy.resets} connections were reset, {anew} processes anew")


class NodeScenario(Scenario):
    """Two nodes of one rank each; the world may have either size."""

    exact = False
    epochs, step_seconds = 12, 0.4

    def job(self, lab: Lab, stack: ExitStack) -> Job:
        self._network = TwoNodes()
        stack.callback(self._network.down)
        nodes = self._network.up()
        run = LocalRun(lab.folder / self.name / "run")
        return lab.job(self.name, run, self.epochs, nodes=nodes)

    def kill_node(self, node: Node) -> None:
        processes = node.ranks()
        if node.agent is not None:
            node.agent.kill()
        for process in processes:
            with suppress(psutil.Error):
                process.kill()


class NodesComeAndGo(NodeScenario):
    """A node starts alone, another joins; it dies, returns; then that with the rendezvous dies."""

    name = "nodes"

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        first, second = job.nodes
        if not job.until_world(2):
            return
        second.wanted = False
        job.recover(lambda: self.kill_node(second))
        if not job.until_world(1) or not job.go_on(3):
            return
        second.wanted = True
        job.recover(lambda: job.launch(second))
        if not job.until_world(2) or not job.go_on(3):
            return
        job.recover(lambda: self.kill_node(first))
        job.until_world(2)


class LinkCut(NodeScenario):
    """The network between two nodes is cut for longer than they wait, and comes back."""

    name, times = "link", 1

    def disturb(self, lab: Lab, job: Job, calm: Calm) -> None:
        if not job.until_world(2) or not job.go_on(2):
            return
        try:
            there = job.recover(self._network.cut, 180) and job.go_on(5)
        finally:
            self._network.mend()
        if there:
            job.outlast(lambda: None)
            job.until_world(2)


ALL: dict[str, type[Scenario]] = {
    scenario.name: scenario
    for scenario in (
        KillRank, KillInCheckpoint, KillAgent, StopRank, Sigterm, Damage, ClockJumps, DiskFull,
        BucketKillRank, BucketPauses, BucketDies, BadNetwork, NodesComeAndGo, LinkCut,
    )
}  # fmt: skip
