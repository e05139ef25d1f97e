"""Long-lived worker processes: each imports torch once and does one job after another.

A job that fails, or that kills its worker, is reported, and the other jobs go on.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, TypeVar

from cnsdiff_dist.errors import UserError

JobT = TypeVar("JobT")

_LAUNCHER_VARIABLES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()


class WorkerProcesses(Generic[JobT]):
    """Up to ``processes`` workers, each started when there is a job for it.

    Args:
        work: does a job in a worker. It must be importable, since workers are spawned.
        logs: a local directory for what the workers print, or None to drop it.
    """

    def __init__(self, work: Callable[[JobT], None], processes: int, logs: Path | None) -> None:
        self._work, self._processes, self._logs = work, processes, logs
        self._workers: list[_Worker[JobT]] = []

    def run(
        self, jobs: Iterable[JobT], settled: Callable[[JobT, str | None], Iterable[JobT]]
    ) -> None:
        """Do the jobs, and the jobs that follow from them.

        Args:
            settled: is called when a job has ended, with the job and with the line that says why
                it failed, or None. Returns the jobs that follow.
        """
        waiting = deque(jobs)
        try:
            while waiting or any(worker.job for worker in self._workers):
                self._hand_out(waiting)
                for worker in self._wait_for_ended_jobs():
                    job, reason = worker.take()
                    waiting.extend(settled(job, reason))
        except BaseException:
            for worker in self._workers:
                worker.process.terminate()
            raise
        finally:
            self._end_workers()

    def _hand_out(self, waiting: "deque[JobT]") -> None:
        self._workers = [worker for worker in self._workers if worker.process.is_alive()]
        while waiting:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                if len(self._workers) == self._processes:
                    return
                idle = _Worker(self._work, self._logs)
                self._workers.append(idle)
            idle.give(waiting.popleft())

    def _wait_for_ended_jobs(self) -> "list[_Worker[JobT]]":
        busy = [worker for worker in self._workers if worker.job is not None]
        ready = wait([worker.pipe for worker in busy] + [w.process.sentinel for w in busy])
        return [w for w in busy if w.pipe in ready or w.process.sentinel in ready]

    def _end_workers(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # an idle worker exits at the end of its pipe
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


class _Worker(Generic[JobT]):
    """One process, the pipe to it, and the job that it does, None while it is idle."""

    def __init__(self, work: Callable[[JobT], None], logs: Path | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(worker_end, work, logs), daemon=True)
        self.process.start()
        worker_end.close()
        self.job: JobT | None = None

    def give(self, job: JobT) -> None:
        self.job = job
        with suppress(BrokenPipeError):  # the worker died; its sentinel tells the caller
            self.pipe.send(job)

    def take(self) -> tuple[JobT, str | None]:
        """The job that has ended, and why it failed, or None if it did not."""
        job = self.job
        assert job is not None
        self.job = None
        try:
            if self.pipe.poll():
                reason: str | None = self.pipe.recv()
                return job, reason
        except (EOFError, OSError):
            pass
        self.process.join()
        return job, f"its process died ({_cause(self.process.exitcode or 0)})"


def _cause(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}; out of memory?"
    return f"exit code {code}"


def _serve(pipe: Connection, work: Callable[[JobT], None], logs: Path | None) -> None:
    """Do the jobs that arrive, as a world of one rank on one thread, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    for name in _LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = "1"
    _redirect(logs)
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(_attempt(work, pipe.recv()))
    os._exit(0)


def _redirect(logs: Path | None) -> None:
    """Send what is printed to this worker's own file."""
    target = os.devnull if logs is None else str(logs / f"worker-{os.getpid()}.txt")
    file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())


def _attempt(work: Callable[[JobT], None], job: JobT) -> str | None:
    """Do a job; return the line that says why it failed, or None."""
    try:
        work(job)
    except UserError as error:
        return " ".join(str(error).split())
    except Exception as error:
        traceback.print_exc()
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
