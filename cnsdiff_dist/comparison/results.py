"""What the runs of a suite found: rows, values over seeds, and ours against the best other."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.diagnostics import read_diagnostics
from cnsdiff_dist.comparison.scheduler import best_trial
from cnsdiff_dist.comparison.single_run import finished_result
from cnsdiff_dist.comparison.suite import Job, Suite, cells, jobs_of
from cnsdiff_dist.runs.records import read_metrics

TABLE_METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
TEST_SPLITS = ("test_ood", "test_iid")

Row = dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; it is ``chosen`` if it belongs to the best trial of its cell."""

    job: Job
    chosen: bool
    result: dict[str, Any]

    @property
    def url(self) -> str:
        return self.job.url

    def evaluation(self, split: str, adjustment: str) -> dict[str, Any] | None:
        for entry in self.result["evaluations"]:
            if (entry["split"], entry["adjustment"]) == (split, adjustment):
                found: dict[str, Any] = entry
                return found
        return None

    @property
    def validation(self) -> float:
        """The value that selects, under the best alpha of ``evaluation.alphas``."""
        return float(self.result["selection"]["value"])


@dataclass(frozen=True)
class Verdict:
    """Ours against the best other method, which validation chose.

    ``gain`` is ours over the other's minus 1 on the OOD test, and ``iid_ratio`` ours over the
    other's on the IID test, both averaged over the four metrics.
    """

    dataset: str
    adjustment: str
    ours: str
    other: str
    gain: float
    iid_ratio: float


def finished_runs(suite: Suite) -> list[FinishedRun]:
    """Every finished run; in each cell, those of the best trial by validation are chosen."""
    found = []
    for cell in cells(suite):
        jobs = [job for trial in jobs_of(suite, cell) for job in trial]
        done = [(job, result) for job in jobs if (result := finished_result(job))]
        validation = {
            job.trial: result["selection"]["value"]
            for job, result in done
            if job.seed == suite.seeds[0]
        }
        best = best_trial(validation)
        found += [FinishedRun(job, job.trial == best, result) for job, result in done]
    return found


def adjustments(runs: list[FinishedRun]) -> list[str]:
    """The adjustments that the runs were evaluated with, ``none`` first."""
    names = {entry["adjustment"] for run in runs for entry in run.result["evaluations"]}
    return sorted(names, key=lambda name: (name != "none", name))


def result_rows(runs: list[FinishedRun]) -> list[Row]:
    """One row per run, test split and adjustment: the rows of runs.parquet."""
    found = []
    for run in runs:
        job, best = run.job, run.result["selection"]
        head = {
            "dataset": job.dataset,
            "method": job.method,
            "trial": job.trial,
            "values": json.dumps(job.values),
            "seed": job.seed,
            "chosen": run.chosen,
            "selection_split": best["split"],
            "selection_metric": best["metric"],
        }
        tail = {"step_ms": step_ms(run), "seconds": run.result["seconds"], "run": run.url}
        tail |= diagnostic_values(run.url)
        for entry in run.result["evaluations"]:
            of_entry = {name: entry[name] for name in ("split", "adjustment", "alpha")}
            of_entry |= {"selection": run.validation, **entry["metrics"]}
            found.append(head | of_entry | tail)
    return found


def write_rows(rows: list[Row], url: str) -> None:
    """Write rows as Parquet; a value that a row lacks is null."""
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    with storage.open_write(url) as file:
        pq.write_table(table, file)


def step_ms(run: FinishedRun) -> float | None:
    """The median time of a training step, without evaluations and checkpoints."""
    rates = [
        line["samples_per_second"] for line in read_metrics(run.url) if line["kind"] == "train"
    ]
    return 1000 * run.job.config.train.batch / statistics.median(rates) if rates else None


def diagnostic_values(url: str) -> Row:
    """The numbers of a run's diagnosis as ``diagnostics.NAME``; empty if it was not diagnosed."""
    found = read_diagnostics(url) or {}
    return {f"diagnostics.{k}": float(v) for k, v in found.items() if isinstance(v, int | float)}


def chosen_runs(runs: list[FinishedRun], dataset: str, method: str) -> list[FinishedRun]:
    """The runs of the best trial of a cell, one per seed."""
    cell = (dataset, method)
    return [run for run in runs if run.chosen and (run.job.dataset, run.job.method) == cell]


def values_over_seeds(
    runs: list[FinishedRun], dataset: str, method: str, split: str, adjustment: str, metric: str
) -> list[float]:
    """A metric of each chosen run of a cell; empty if there is none."""
    entries = [run.evaluation(split, adjustment) for run in chosen_runs(runs, dataset, method)]
    return [entry["metrics"][metric] for entry in entries if entry and metric in entry["metrics"]]


def best_other(suite: Suite, runs: list[FinishedRun], dataset: str) -> str | None:
    """The best rival: of the methods that are neither ours nor an ablation, the one whose chosen
    runs have the highest mean validation over seeds. None if no rival has finished."""
    found: dict[str, float] = {}
    for method, entry in suite.methods.items():
        values = [run.validation for run in chosen_runs(runs, dataset, method)]
        if method != suite.ours and not entry.ablation and values:
            found[method] = statistics.mean(values)
    return max(found, key=lambda method: found[method], default=None)


def verdict(suite: Suite, runs: list[FinishedRun], dataset: str, adjustment: str) -> Verdict | None:
    """Compare ours with the best other method; None while there is nothing to compare."""
    other = best_other(suite, runs, dataset)
    if other is None:
        return None
    ood = _ratios(suite.ours, other, runs, dataset, "test_ood", adjustment)
    iid = _ratios(suite.ours, other, runs, dataset, "test_iid", adjustment)
    if not ood and not iid:
        return None
    gain = statistics.mean(ood) - 1 if ood else float("nan")
    iid_ratio = statistics.mean(iid) if iid else float("nan")
    return Verdict(dataset, adjustment, suite.ours, other, gain, iid_ratio)


def _ratios(
    ours: str, other: str, runs: list[FinishedRun], dataset: str, split: str, adjustment: str
) -> list[float]:
    """Ours over the other's mean over seeds, for each metric."""
    found = []
    for metric in TABLE_METRICS:
        top, bottom = (
            values_over_seeds(runs, dataset, method, split, adjustment, metric)
            for method in (ours, other)
        )
        if top and bottom and statistics.mean(bottom) > 0:
            found.append(statistics.mean(top) / statistics.mean(bottom))
    return found
