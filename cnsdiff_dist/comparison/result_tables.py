"""The result tables of a comparison, the same for Markdown and HTML."""

import math
import statistics
from dataclasses import dataclass

from cnsdiff_dist.comparison.results import (
    TABLE_METRICS,
    TEST_SPLITS,
    FinishedRun,
    Verdict,
    adjustments,
    chosen_runs,
    values_over_seeds,
    verdict,
)
from cnsdiff_dist.comparison.significance import Stars
from cnsdiff_dist.comparison.suite import Suite

_SHORT = {"test_ood": "OOD", "test_iid": "IID"}
_METRIC_HEADS = [f"{_SHORT[split]} {metric}" for split in TEST_SPLITS for metric in TABLE_METRICS]


@dataclass(frozen=True)
class ResultTable:
    """A table whose cells are text; ``notes`` are lines below it."""

    title: str
    head: list[str]
    body: list[list[str]]
    notes: list[str]


def result_tables(
    suite: Suite, runs: list[FinishedRun], stars: Stars | None = None
) -> list[ResultTable]:
    """One table per dataset and, of several datasets, one of the averages over them."""
    found = [dataset_table(suite, runs, dataset, stars or {}) for dataset in suite.datasets]
    return [*found, average_table(suite, runs)] if len(suite.datasets) > 1 else found


def dataset_table(suite: Suite, runs: list[FinishedRun], dataset: str, stars: Stars) -> ResultTable:
    """Mean ± standard deviation over seeds of the chosen runs, with stars beside ours."""
    body, notes = [], []
    for adjustment in adjustments(runs):
        for method in suite.methods:
            chosen = chosen_runs(runs, dataset, method)
            if not chosen or chosen[0].evaluation(TEST_SPLITS[0], adjustment) is None:
                continue
            settings = ", ".join(f"{k}={_short(v)}" for k, v in chosen[0].job.values.items())
            validation = _mean([run.validation for run in chosen])
            cells = [method, adjustment, settings, str(len(chosen)), validation]
            for split in TEST_SPLITS:
                for metric in TABLE_METRICS:
                    found = values_over_seeds(runs, dataset, method, split, adjustment, metric)
                    mark = stars.get((dataset, adjustment, split, metric), "")
                    cells.append(_mean(found) + (mark if method == suite.ours else ""))
            body.append(cells)
        if found_verdict := verdict(suite, runs, dataset, adjustment):
            notes.append(_verdict_line(found_verdict))
    head = ["method", "adjustment", "chosen trial", "seeds", "validation", *_METRIC_HEADS]
    title = f"{dataset} (selected on {suite.datasets[dataset].select})"
    return ResultTable(title, head, body, notes)


def average_table(suite: Suite, runs: list[FinishedRun]) -> ResultTable:
    """Means over datasets of the means over seeds; empty where a dataset is missing."""
    body, notes = [], []
    for adjustment in adjustments(runs):
        for method in suite.methods:
            means = [
                _mean_over_datasets(suite, runs, method, split, adjustment, metric)
                for split in TEST_SPLITS
                for metric in TABLE_METRICS
            ]
            if any(means):
                body.append([method, adjustment, *means])
        known = [v for name in suite.datasets if (v := verdict(suite, runs, name, adjustment))]
        if known:
            notes.append(_average_line(suite.ours, adjustment, known))
    head = ["method", "adjustment", *_METRIC_HEADS]
    return ResultTable("average over datasets", head, body, notes)


def _mean_over_datasets(
    suite: Suite, runs: list[FinishedRun], method: str, split: str, adjustment: str, metric: str
) -> str:
    found = [
        values_over_seeds(runs, dataset, method, split, adjustment, metric)
        for dataset in suite.datasets
    ]
    return f"{statistics.mean(map(statistics.mean, found)):.4f}" if all(found) else ""


def _verdict_line(found: Verdict) -> str:
    return (
        f"adjustment {found.adjustment}: {found.ours} against {found.other}, the best other by "
        f"validation: OOD {found.gain:+.1%}, IID ratio {found.iid_ratio:.3f} "
        "(averages over the four metrics)"
    )


def _average_line(ours: str, adjustment: str, known: list[Verdict]) -> str:
    gain = statistics.mean(v.gain for v in known)
    ratios = [v.iid_ratio for v in known if not math.isnan(v.iid_ratio)]
    ratio = statistics.mean(ratios) if ratios else math.nan
    return (
        f"adjustment {adjustment}: {ours} against the best other of each of "
        f"{len(known)} datasets: OOD {gain:+.1%}, IID ratio {ratio:.3f}"
    )


def markdown(title: str, tables: list[ResultTable]) -> str:
    lines = [f"# {title}", "", "Mean ± standard deviation over seeds; no test value selects."]
    for table in tables:
        lines += ["", f"## {table.title}", "", _line(table.head), "|" + "---|" * len(table.head)]
        lines += [_line(cells) for cells in table.body]
        lines += ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
