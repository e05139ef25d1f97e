"""What the runs of a suite found: rows, means over seeds, and ours against the best other."""

import json
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.diagnostics import read_diagnostics
from cnsdiff_dist.comparison.scheduler import best_trial
from cnsdiff_dist.comparison.single_run import finished_result
from cnsdiff_dist.comparison.suite import Job, Suite, groups, jobs_of
from cnsdiff_dist.runs.directory import read_metrics

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
SPLITS = ("test_ood", "test_iid")

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run. ``chosen`` are those that the tables are made of."""

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
        """The value that selects; in training every alpha of ``evaluation.alphas`` counts."""
        return float(self.result["selection"]["value"])


@dataclass(frozen=True)
class Verdict:
    """Ours against the best other method, which validation chose.

    ``gain`` is the relative gain out of distribution and ``iid_ratio`` ours over the other's in
    distribution, both averaged over the four metrics.
    """

    dataset: str
    adjustment: str
    ours: str
    other: str
    gain: float
    iid_ratio: float


def finished_runs(suite: Suite) -> list[Run]:
    """Every finished run; of each search, the best trial by validation is chosen."""
    found = []
    for group in groups(suite):
        jobs = [job for trial in jobs_of(suite, *group) for job in trial]
        done = [(job, result) for job in jobs if (result := finished_result(job))]
        chosen = best_trial(
            {
                job.trial: result["selection"]["value"]
                for job, result in done
                if job.seed == suite.seeds[0]
            }
        )
        found += [Run(job, job.trial == chosen, result) for job, result in done]
    return found


def adjustments(runs: list[Run]) -> list[str]:
    """Those that the runs were evaluated with, ``none`` first."""
    names = {entry["adjustment"] for run in runs for entry in run.result["evaluations"]}
    return sorted(names, key=lambda name: (name != "none", name))


def rows(runs: list[Run]) -> list[Row]:
    """One row per run, split and adjustment."""
    found = []
    for run in runs:
        job, best = run.job, run.result["selection"]
        head = {
            "dataset": job.dataset, "method": job.method, "trial": job.trial,
            "values": json.dumps(job.values), "seed": job.seed, "chosen": run.chosen,
            "selection_split": best["split"], "selection_metric": best["metric"],
        }  # fmt: skip
        tail = {"step_ms": step_ms(run), "seconds": run.result["seconds"], "run": run.url}
        tail |= diagnostics(run.url)
        for entry in run.result["evaluations"]:
            found.append(
                {
                    **head,
                    "split": entry["split"],
                    "adjustment": entry["adjustment"],
                    "alpha": entry["alpha"],
                    "selection": run.validation,
                    **entry["metrics"],
                    **tail,
                }
            )
    return found


def write_rows(found: list[Row], url: str) -> None:
    """Write Parquet; a value that a row lacks is null."""
    names = dict.fromkeys(name for row in found for name in row)
    table = pa.table({name: [row.get(name) for row in found] for name in names})
    with storage.open_write(url) as file:
        pq.write_table(table, file)


def step_ms(run: Run) -> float | None:
    """The median time of a training step, without evaluations and checkpoints."""
    paces = [
        line["samples_per_second"] for line in read_metrics(run.url) if line["kind"] == "train"
    ]
    return 1000 * run.job.config.train.batch / statistics.median(paces) if paces else None


def diagnostics(url: str) -> Row:
    """The numbers of a run's diagnosis as ``diagnostics.NAME``; none without one."""
    found = read_diagnostics(url) or {}
    return {f"diagnostics.{k}": float(v) for k, v in found.items() if isinstance(v, int | float)}


def chosen(runs: list[Run], dataset: str, method: str) -> list[Run]:
    """The chosen runs, one per seed."""
    name = (dataset, method)
    return [run for run in runs if run.chosen and (run.job.dataset, run.job.method) == name]


def over_seeds(
    runs: list[Run], dataset: str, method: str, split: str, adjustment: str, metric: str
) -> list[float]:
    """The values of the chosen runs; empty if there are none."""
    entries = [run.evaluation(split, adjustment) for run in chosen(runs, dataset, method)]
    return [entry["metrics"][metric] for entry in entries if entry and metric in entry["metrics"]]


def best_other(suite: Suite, runs: list[Run], dataset: str) -> str | None:
    """The method, neither ours nor a variant of it, whose chosen runs validate best on average
    over seeds."""
    found: dict[str, float] = {}
    for method, entry in suite.methods.items():
        values = [run.validation for run in chosen(runs, dataset, method)]
        if method != suite.ours and not entry.ablation and values:
            found[method] = statistics.mean(values)
    return max(found, key=lambda method: found[method], default=None)


def verdict(suite: Suite, runs: list[Run], dataset: str, adjustment: str) -> Verdict | None:
    """None while there is nothing to compare."""
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
    ours: str, other: str, runs: list[Run], dataset: str, split: str, adjustment: str
) -> list[float]:
    """Ours over the other's, for each metric."""
    found = []
    for metric in METRICS:
        top, bottom = (
            over_seeds(runs, dataset, method, split, adjustment, metric) for method in (ours, other)
        )
        if top and bottom and statistics.mean(bottom) > 0:
            found.append(statistics.mean(top) / statistics.mean(bottom))
    return found


def significance(
    ours: list[Run], other: list[Run], split: str, adjustment: str, metric: str
) -> float:
    """p of the mean difference over users, each user's value a mean over seeds; 1 if unknown."""
    sides = [_user_values(runs, split, adjustment, metric) for runs in (ours, other)]
    if len(sides[0]) != len(sides[1]) or not len(sides[0]):
        return 1.0
    return paired_bootstrap(sides[0] - sides[1])


def _user_values(runs: list[Run], split: str, adjustment: str, metric: str) -> Floats:
    """[users], in the order of their rows; empty where a run lacks its file."""
    columns = []
    for run in runs:
        path = f"{run.url}/evaluations/{split}.{adjustment}.users.parquet"
        if not storage.exists(path):
            return np.empty(0)
        with storage.open_read(path) as file:
            columns.append(pq.read_table(file, columns=[metric])[metric].to_numpy())
    return np.mean(columns, axis=0) if columns else np.empty(0)


def paired_bootstrap(difference_U: Floats, draws: int = 2000, seed: int = 0) -> float:
    """The two-sided p-value of a mean difference, by resampling users with replacement.

    Args:
        difference_U: [U], ours minus the other's, of the same users.

    Returns:
        Twice the share of resampled means on the far side of 0, at least 2 / (draws + 1).
    """
    generator, users = np.random.default_rng(seed), len(difference_U)
    means = np.empty(draws)
    for index in range(draws):
        means[index] = difference_U[generator.integers(users, size=users)].mean()
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (draws + 1)))
