"""The tables of a comparison, once for Markdown and HTML."""

import math
import statistics
from dataclasses import dataclass

from cnsdiff_dist.comparison.results import (
    METRICS,
    SPLITS,
    Run,
    Verdict,
    adjustments,
    chosen,
    over_seeds,
    verdict,
)
from cnsdiff_dist.comparison.suite import Suite

_SHORT = {"test_ood": "OOD", "test_iid": "IID"}


@dataclass(frozen=True)
class Table:
    """Cells as text; ``notes`` are lines below."""

    title: str
    head: list[str]
    body: list[list[str]]
    notes: list[str]


Stars = dict[tuple[str, str, str, str], str]
"""Marks of significance by (dataset, adjustment, split, metric), beside ours."""


def tables_of(suite: Suite, runs: list[Run], stars: Stars | None = None) -> list[Table]:
    """One table per dataset, then the averages over datasets."""
    found = [dataset_table(suite, runs, dataset, stars or {}) for dataset in suite.datasets]
    return [*found, average_table(suite, runs)] if len(suite.datasets) > 1 else found


def dataset_table(suite: Suite, runs: list[Run], dataset: str, stars: Stars) -> Table:
    """Mean ± standard deviation over seeds of the chosen trials."""
    body, notes = [], []
    for adjustment in adjustments(runs):
        for method in suite.methods:
            some = chosen(runs, dataset, method)
            if not some or some[0].evaluation(SPLITS[0], adjustment) is None:
                continue
            values = ", ".join(f"{key}={_short(v)}" for key, v in some[0].job.values.items())
            known = [run.validation for run in some]
            cells = [method, adjustment, values, str(len(some)), _mean(known)]
            for split in SPLITS:
                for metric in METRICS:
                    found = over_seeds(runs, dataset, method, split, adjustment, metric)
                    mark = stars.get((dataset, adjustment, split, metric), "")
                    cells.append(_mean(found) + (mark if method == suite.ours else ""))
            body.append(cells)
        if found_verdict := verdict(suite, runs, dataset, adjustment):
            notes.append(verdict_line(found_verdict))
    head = ["method", "adjustment", "chosen trial", "seeds", "validation", *_metric_heads()]
    return Table(f"{dataset} (selected on {suite.datasets[dataset].select})", head, body, notes)


def average_table(suite: Suite, runs: list[Run]) -> Table:
    """Means over datasets of the means over seeds, for methods that have them all."""
    body, notes = [], []
    for adjustment in adjustments(runs):
        for method in suite.methods:
            cells = [method, adjustment]
            for split in SPLITS:
                for metric in METRICS:
                    found = [
                        over_seeds(runs, dataset, method, split, adjustment, metric)
                        for dataset in suite.datasets
                    ]
                    means = [statistics.mean(values) for values in found if values]
                    complete = len(means) == len(suite.datasets)
                    cells.append(f"{statistics.mean(means):.4f}" if complete else "")
            if any(cells[2:]):
                body.append(cells)
        known = [v for name in suite.datasets if (v := verdict(suite, runs, name, adjustment))]
        if known:
            gain = statistics.mean(v.gain for v in known)
            ratios = [v.iid_ratio for v in known if not math.isnan(v.iid_ratio)]
            ratio = statistics.mean(ratios) if ratios else math.nan
            notes.append(
                f"adjustment {adjustment}: {suite.ours} against the best other of each of "
                f"{len(known)} datasets: OOD {gain:+.1%}, IID ratio {ratio:.3f}"
            )
    return Table("average over datasets", ["method", "adjustment", *_metric_heads()], body, notes)


def verdict_line(found: Verdict) -> str:
    return (
        f"adjustment {found.adjustment}: {found.ours} against {found.other}, the best other by "
        f"validation: OOD {found.gain:+.1%}, IID ratio {found.iid_ratio:.3f} "
        "(averages over the four metrics)"
    )


def markdown(title: str, tables: list[Table]) -> str:
    lines = [f"# {title}", "", "Mean ± standard deviation over seeds; no test value selects."]
    for table in tables:
        lines += ["", f"## {table.title}", "", _line(table.head), "|" + "---|" * len(table.head)]
        lines += [_line(cells) for cells in table.body]
        lines += ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def _metric_heads() -> list[str]:
    return [f"{_SHORT[split]} {metric}" for split in SPLITS for metric in METRICS]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
