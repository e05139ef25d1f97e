"""Runs a suite: trials on the first seed, then the best of each search on the other seeds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from rich.progress import TimeElapsedColumn

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.single_run import TRADE_OFF, finished_result
from cnsdiff_dist.comparison.suite import Job, Suite, dump_suite, groups, jobs_of
from cnsdiff_dist.comparison.workers import Pool
from cnsdiff_dist.runs.reporter import Screen

FAILURES = "failures.json"


def best_trial(validation: Mapping[int, float]) -> int | None:
    """The trial with the highest validation value, the first of equals; None of none."""
    return max(sorted(validation), key=lambda trial: validation[trial], default=None)


class Driver:
    """Which runs of a suite are done, which are next, and why some failed.

    Chosen runs of the first seed are diagnosed too.
    """

    def __init__(self, suite: Suite, say: "Reporting") -> None:
        self._suite, self._say = suite, say
        self._jobs = {group: jobs_of(suite, *group) for group in groups(suite)}
        self._settled: dict[tuple[str, str], dict[int, float | None]] = {g: {} for g in self._jobs}
        self.failures: dict[str, str] = {}

    @property
    def total(self) -> int:
        """How many runs the suite has."""
        return len(self._jobs) * (self._suite.search.trials + len(self._suite.seeds) - 1)

    def run(self, work: Callable[[Job], None], processes: int) -> None:
        """Run all that is not done.

        Raises:
            UserError: the output cannot be written.
        """
        out = self._suite.out
        storage.write_text(f"{out}/suite.yaml", dump_suite(self._suite))
        logs = None
        if storage.is_local(out):
            logs = storage.local_path(out) / "logs"
            logs.mkdir(parents=True, exist_ok=True)
        first = [trial[0] for trials in self._jobs.values() for trial in trials]
        try:
            Pool(work, processes, logs).run(self._open(first), self._settle)
        finally:
            storage.write_json(f"{out}/{FAILURES}", self.failures)

    def _open(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that are not done, and what follows from those that are."""
        found = []
        for job in jobs:
            if finished_result(job):
                found += self._settle(job, None)
            else:
                found.append(job)
        return found

    def _settle(self, job: Job, reason: str | None) -> list[Job]:
        """Note how a job ended.

        Returns:
            The jobs that can start now.
        """
        result = None if reason else finished_result(job)
        if reason:
            self.failures[job.label] = reason
        if job.task == "diagnose":
            if reason:
                self._say.say(f"{job.label}: diagnosis failed: {reason}")
            return []
        self._say.settled(job, reason, result["selection"] if result else None)
        if job.seed != self._suite.seeds[0]:
            return []
        group = (job.dataset, job.method)
        values = self._settled[group]
        values[job.trial] = result["selection"]["value"] if result else None
        return self._follow(group) if len(values) == len(self._jobs[group]) else []

    def _follow(self, group: tuple[str, str]) -> list[Job]:
        """After the last trial of a search: its best trial on the other seeds."""
        done = {t: value for t, value in self._settled[group].items() if value is not None}
        chosen = best_trial(done)
        if chosen is None:
            self._say.say(f"{' '.join(group)}: no trial succeeded")
            return []
        first, *others = self._jobs[group][chosen]
        follow = self._open(others)
        if not storage.exists(f"{first.url}/{TRADE_OFF}"):
            follow.append(replace(first, task="diagnose"))
        return follow


class Reporting(Screen):
    """A suite's runs, one line each."""

    def __init__(self) -> None:
        super().__init__(TimeElapsedColumn())
        self._task = self._bar.add_task("runs", total=0)
        self._done, self._total = 0, 0

    def begin(self, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total)

    def settled(self, job: Job, reason: str | None, best: dict[str, object] | None) -> None:
        self._done += 1
        self._bar.advance(self._task)
        what = f"failed: {reason}"
        if best:
            what = f"best {best['split']} {best['metric']} {best['value']:.4f}"
        self.say(f"[{self._done}/{self._total}] {job.label}: {what}")
