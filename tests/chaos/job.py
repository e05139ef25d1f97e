"""A training under torchrun that is started again whenever it fails, as a cluster does."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.store import Run
from tests.chaos.watch import Watcher

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
STANDALONE = ["--standalone", "--nproc-per-node", "2"]
ELASTIC = ["--max-restarts", "1000", "--monitor-interval", "0.1"]
# torchrun (2.13) remembers on which node the ranks' store was, which is wrong once nodes change.
COMING_AND_GOING = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Stuck(Exception):
    """A condition that was waited for did not come true in time."""


@dataclass
class Node:
    """A torchrun agent and its ranks; ``prefix`` are the words that put it into a namespace."""

    words: list[str] = field(default_factory=lambda: list(STANDALONE))
    prefix: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    wanted: bool = True  # False while a fault keeps it down
    agent: subprocess.Popen[bytes] | None = None

    def ranks(self) -> list[psutil.Process]:
        """The worker processes, including those that are still starting."""
        with suppress(psutil.Error):
            if self.agent is not None and self.agent.poll() is None:
                return psutil.Process(self.agent.pid).children()
        return []


class Job:
    """A training, started again until it finishes.

    Args:
        folder: where log and trace go.
        rank_prefix: words before the ranks' interpreter, such as ``env LD_PRELOAD=..``.
    """

    def __init__(
        self,
        folder: Path,
        config: Path,
        run: Run,
        nodes: list[Node] | None = None,
        environment: dict[str, str] | None = None,
        rank_prefix: list[str] | None = None,
    ) -> None:
        self.folder, self.config, self.run = folder, config, run
        self.nodes = nodes or [Node()]
        self.mark = uuid.uuid4().hex
        self.trace, self.log = folder / "trace", folder / "log"
        self.trace.mkdir(parents=True, exist_ok=True)
        self.environment, self._rank_prefix = environment or {}, rank_prefix or []
        self.launches, self.exit_codes = 0, []
        self.finished = False
        self.overlaps = False  # two trainings run at once, so the newest commit may change any time
        self.recoveries: list[float] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.disturbances = 0
        self.watcher = Watcher(self.trace, run)

    def launch(self, node: Node) -> None:
        self.launches += 1
        marks = {"CHAOS_MARK": self.mark, "CHAOS_LAUNCH": str(self.launches)}
        python = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CHAOS_TRACE": str(self.trace)}
        environment = {**os.environ, **python, **marks, **self.environment, **node.environment}
        program = [*self._rank_prefix, sys.executable, "-u", "-m", "tests.chaos.worker"]
        agent = [*node.prefix, TORCHRUN, *node.words, *ELASTIC, "--no-python"]
        command = [*agent, *program, "train", str(self.config)]
        with self.log.open("a") as log:
            node.agent = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
            )

    def start(self) -> None:
        for node in self.nodes:
            if node.wanted:
                self.launch(node)

    def tend(self) -> None:
        """Start agents that died again, and notice when the training is finished."""
        for node in self.nodes:
            code = node.agent.poll() if node.agent is not None else None
            if code is None:
                continue
            self.exit_codes.append(code)
            node.agent = None
            if code == 0 and node is self.nodes[0]:
                self.finished = True
            elif node.wanted:
                self.launch(node)

    def until(
        self,
        condition: Callable[[], bool],
        seconds: float = 120,
        what: str = "",
        pause: float = 0.01,
    ) -> bool:
        """Tend the job until a condition holds; return False if the training finishes before.

        Raises:
            Stuck: neither happened in time.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            self.tend()
            if self.finished:
                return False
            if time.monotonic() > deadline:
                raise Stuck(f"{what or 'a new training step'} did not come in {seconds:.0f} s")
            time.sleep(pause)
        return True

    def go_on(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() > end, seconds + 60)

    def until_first_step(self) -> bool:
        return self.until(lambda: bool(self.watcher.attempts()))

    def until_world(self, size: int, seconds: float = 120) -> bool:
        """Wait until the newest process trains in a world of this size."""
        return self.until(lambda: self.watcher.world_size() == size, seconds, f"a world of {size}")

    def recover(self, fault: Callable[[], None], seconds: float = 120) -> bool:
        """Make a fault, and note how long it takes until a new process trains."""
        before, started = self.watcher.attempts(), time.monotonic()
        self.disturbances += 1
        fault()
        there = self.until(lambda: bool(self.watcher.attempts() - before), seconds)
        if there:
            self.recoveries.append(time.monotonic() - started)
        return there

    def outlast(self, end: Callable[[], None], seconds: float = 180) -> bool:
        """End a disturbance, and note how long it takes until any step is trained."""
        end()
        before, started = self.watcher.traced_bytes(), time.monotonic()
        there = self.until(lambda: self.watcher.traced_bytes() > before, seconds)
        if there:
            self.recoveries.append(time.monotonic() - started)
        return there

    def ranks(self) -> list[psutil.Process]:
        return [rank for node in self.nodes for rank in node.ranks()]

    def wait_for_ranks(self) -> list[psutil.Process]:
        """Wait until there is at least one rank, and return all."""
        found: list[psutil.Process] = []

        def there() -> bool:
            found[:] = self.ranks()
            return bool(found)

        if not self.until(there, what="a rank"):
            raise Stuck("the training finished before the fault; give it more epochs")
        return found

    def marked(self) -> list[psutil.Process]:
        """Every process that this job started, also those whose parent has died."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, FileNotFoundError):
                if process.status() != psutil.STATUS_ZOMBIE and (
                    process.environ().get("CHAOS_MARK") == self.mark
                ):
                    found.append(process)
        return found

    def finish(self, seconds: float = 600) -> None:
        """Wait undisturbed until the training ends."""
        if not self.finished:
            self.until(lambda: False, seconds, "the end of the training")
        deadline = time.monotonic() + 30
        for node in self.nodes:  # the other agents of a finished training end by themselves
            if node.agent is not None:
                with suppress(subprocess.TimeoutExpired):
                    node.agent.wait(max(0.1, deadline - time.monotonic()))

    def stop(self) -> None:
        """Kill every process of the job."""
        for _ in range(20):
            left = self.marked()
            if not left:
                break
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
        for node in self.nodes:
            if node.agent is not None:
                node.agent.wait()
        self.watcher.stop()
