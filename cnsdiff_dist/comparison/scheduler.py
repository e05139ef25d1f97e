"""Runs a suite: every trial on the first seed, then each cell's best trial on the other seeds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from rich.progress import TimeElapsedColumn

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.single_run import TRADE_OFF, finished_result
from cnsdiff_dist.comparison.suite import Cell, Job, Suite, cells, dump_suite, jobs_of
from cnsdiff_dist.comparison.workers import WorkerProcesses
from cnsdiff_dist.runs.reporter import Screen

FAILURES = "failures.json"


def best_trial(validation: Mapping[int, float]) -> int | None:
    """The trial with the highest validation value, the first of equals; None if there is none."""
    return max(sorted(validation), key=lambda trial: validation[trial], default=None)


class Scheduler:
    """Decides which runs of a suite are next, and records why some failed.

    On the first seed, the best trial of each cell is also diagnosed.
    """

    def __init__(self, suite: Suite, progress: "SuiteProgress") -> None:
        self._suite, self._progress = suite, progress
        self._jobs = {cell: jobs_of(suite, cell) for cell in cells(suite)}
        # Of each cell's ended trials on the first seed, the validation value; None if one failed.
        self._validation: dict[Cell, dict[int, float | None]] = {cell: {} for cell in self._jobs}
        self.failures: dict[str, str] = {}

    @property
    def total(self) -> int:
        """How many runs the suite has."""
        return len(self._jobs) * (self._suite.search.trials + len(self._suite.seeds) - 1)

    def run(self, work: Callable[[Job], None], processes: int) -> None:
        """Run all jobs that are not done.

        Raises:
            UserError: the output cannot be written.
        """
        out = self._suite.out
        storage.write_text(f"{out}/suite.yaml", dump_suite(self._suite))
        workers = WorkerProcesses(work, processes, self._make_log_directory())
        first = [trial[0] for trials in self._jobs.values() for trial in trials]
        try:
            workers.run(self._unfinished(first), self._settle)
        finally:
            storage.write_json(f"{out}/{FAILURES}", self.failures)

    def _make_log_directory(self) -> Path | None:
        """A directory for the workers' output; None if the suite's output is remote."""
        if not storage.is_local(self._suite.out):
            return None
        logs = storage.local_path(self._suite.out) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        return logs

    def _unfinished(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs that are not done yet, and the jobs that follow from those that are."""
        found = []
        for job in jobs:
            if finished_result(job):
                found += self._settle(job, None)
            else:
                found.append(job)
        return found

    def _settle(self, job: Job, reason: str | None) -> list[Job]:
        """Record that a job has ended, ``reason`` saying why if it failed.

        Returns:
            The jobs that can start now.
        """
        result = None if reason else finished_result(job)
        if reason:
            self.failures[job.label] = reason
        if job.task == "diagnose":
            if reason:
                self._progress.say(f"{job.label}: diagnosis failed: {reason}")
            return []
        self._progress.settled(job, reason, result["selection"] if result else None)
        if job.seed != self._suite.seeds[0]:
            return []
        cell = (job.dataset, job.method)
        values = self._validation[cell]
        values[job.trial] = result["selection"]["value"] if result else None
        return self._after_search(cell) if len(values) == len(self._jobs[cell]) else []

    def _after_search(self, cell: Cell) -> list[Job]:
        """After a cell's last trial: the best one on the other seeds, and its diagnosis."""
        done = {t: value for t, value in self._validation[cell].items() if value is not None}
        chosen = best_trial(done)
        if chosen is None:
            self._progress.say(f"{' '.join(cell)}: no trial succeeded")
            return []
        first, *others = self._jobs[cell][chosen]
        found = self._unfinished(others)
        if not storage.exists(f"{first.url}/{TRADE_OFF}"):
            found.append(replace(first, task="diagnose"))
        return found


class SuiteProgress(Screen):
    """Shows a progress bar over the runs of a suite, and a line for each run that ends."""

    def __init__(self) -> None:
        super().__init__(TimeElapsedColumn())
        self._task = self._bar.add_task("runs", total=0)
        self._done, self._total = 0, 0

    def begin(self, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total)

    def settled(self, job: Job, reason: str | None, best: dict[str, object] | None) -> None:
        """Count a run, which failed for ``reason`` or has this ``best`` validation."""
        self._done += 1
        self._bar.advance(self._task)
        what = f"failed: {reason}"
        if best:
            what = f"best {best['split']} {best['metric']} {best['value']:.4f}"
        self.say(f"[{self._done}/{self._total}] {job.label}: {what}")
