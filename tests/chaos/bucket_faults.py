"""Faults of an object store and of the network to it."""

from contextlib import ExitStack

from tests.chaos.invariants import Calm
from tests.chaos.job import Job
from tests.chaos.lab import Lab
from tests.chaos.process_faults import KillRank
from tests.chaos.proxy import Proxy, Weather
from tests.chaos.scenario import Scenario
from tests.chaos.store import BucketRun
from tests.support.s3server import S3Server


class BucketScenario(Scenario):
    """A scenario whose dataset and run are in a bucket."""

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
            Weather(latency=0.1),
            Weather(reset_chance=0.05),
            Weather(bytes_per_second=100_000),
            Weather(0.03, 0.02, 400_000),
        ]
        for weather in weathers[-self.count(lab) - 1 :]:
            job.disturbances += 1
            self._proxy.weather = weather
            if not job.go_on(10):
                break
        self._proxy.weather = Weather()
        job.outlast(lambda: None)
        anew = len(job.watcher.attempts()) - 2
        job.notes.append(f"{self._proxy.resets} connections were reset, {anew} processes anew")
