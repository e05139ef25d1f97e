"""The HTML report of a suite, and of a single run."""

import json
from typing import Any

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.html_builder import HtmlPage
from cnsdiff_dist.comparison.result_tables import ResultTable
from cnsdiff_dist.comparison.results import (
    FinishedRun,
    best_other,
    chosen_runs,
    diagnostic_values,
    step_ms,
)
from cnsdiff_dist.comparison.single_run import read_trade_off
from cnsdiff_dist.comparison.suite import Suite
from cnsdiff_dist.config import Config
from cnsdiff_dist.runs.directory import read_config
from cnsdiff_dist.runs.records import read_metrics

Curve = tuple[list[float], list[float]]
Bars = dict[str, list[float]]

_NOT_LOSSES = "step epoch kind time samples_per_second memory_gib total_steps".split()
_VALIDATION = "Validation over training, best alpha"
_ONE_ENVIRONMENT = "where only one environment's items count, least popular first"
_STEP_TIME = "Median time of a training step, runs side by side"


def suite_page(
    suite: Suite, runs: list[FinishedRun], tables: list[ResultTable], failures: dict[str, str]
) -> str:
    """The report of a suite as HTML.

    Args:
        tables: from :func:`cnsdiff_dist.comparison.result_tables.result_tables`.
        failures: why a run failed, by its label.
    """
    page = HtmlPage(f"Comparison: {suite.name}")
    page.text(
        f"{len(runs)} runs. Every method had {suite.search.trials} trials per dataset on seed "
        f"{suite.seeds[0]}; the best by validation was run on seeds "
        f"{', '.join(map(str, suite.seeds))}. No test chooses anything. Mean ± standard deviation "
        f"over seeds; stars beside {suite.ours}: paired bootstrap over users against the best "
        "other (* p < 0.05, ** 0.01, *** 0.001). Orange: ours; blue: the best other by validation."
    )
    for table in tables[len(suite.datasets) :]:
        _add_table(page, suite, None, table)
    for dataset, table in zip(suite.datasets, tables, strict=False):
        _add_table(page, suite, best_other(suite, runs, dataset), table)
        first = {m: some[0] for m in suite.methods if (some := chosen_runs(runs, dataset, m))}
        _add_suite_figures(page, first)
        if diagnoses := {m: diagnostic_values(run.url) for m, run in first.items()}:
            _add_diagnoses(page, diagnoses)
    if failures:
        page.heading("Runs that failed")
        page.table(["run", "why"], [[run, why] for run, why in failures.items()])
    return page.html()


def run_page(url: str) -> str:
    """The report of one run as HTML, from what is in its directory."""
    config = read_config(url)
    page = HtmlPage(f"Run {storage.display(url)}")
    objective = config.objective
    page.text(
        f"Negatives {config.negatives.kind}; objective {objective.kind} on {objective.similarity}, "
        f"temperature {objective.temperature}; seed {config.run.seed}."
    )
    names = [n for n in storage.list_files(f"{url}/evaluations") if n.endswith(".json")]
    results = [json.loads(storage.read_text(f"{url}/evaluations/{n}")) for n in sorted(names)]
    if results:
        _add_evaluations(page, results)
    else:
        page.text("Not evaluated yet: cnsdiff evaluate RUN --split test_ood.")
    _add_run_figures(page, url, config, results)
    _add_diagnoses(page, {config.negatives.kind: diagnostic_values(url)})
    return page.html()


def _add_table(page: HtmlPage, suite: Suite, other: str | None, table: ResultTable) -> None:
    page.heading(table.title)
    page.highlight(suite.ours, other)
    page.table(table.head, table.body)
    for note in table.notes:
        page.text(note)


def _add_suite_figures(page: HtmlPage, first: dict[str, FinishedRun]) -> None:
    """Add the figures of one dataset, from each method's chosen run on the first seed."""
    curves = {method: _trade_off_curve(run.url) for method, run in first.items()}
    trade_offs = {method: curve for method, curve in curves.items() if curve[0]}
    recalls: Bars = {}
    for method in page.highlighted():
        entry = first[method].evaluation("test_ood", "calibrated") if method in first else None
        if entry:
            recalls[method] = [e["recall@20"] for e in entry["environments"]]
    validations = {method: _validation_curve(run.url) for method, run in first.items()}
    hardness = {method: _metric_curve(run.url, "hardness") for method, run in first.items()}
    times = {method: ms for method, run in first.items() if (ms := step_ms(run))}
    page.figures(
        (
            "IID against OOD Recall@20: a curve is one model under alpha from -0.5 to 1.25",
            page.line_chart(trade_offs, "IID", "OOD", dots=True),
        ),
        (f"OOD Recall@20 (calibrated) {_ONE_ENVIRONMENT}", _environment_chart(page, recalls)),
        (_VALIDATION, page.line_chart(validations, "step", "Recall@20")),
        (
            "Hardness: the share of a row's negatives that outscore its positive",
            page.line_chart(hardness, "step", ""),
        ),
        (_STEP_TIME, page.bar_chart(list(times), {"step": list(times.values())}, "ms")),
    )


def _add_run_figures(
    page: HtmlPage, url: str, config: Config, results: list[dict[str, Any]]
) -> None:
    validation = {"validation": _validation_curve(url)}
    logged = {key for line in read_metrics(url) if line["kind"] == "train" for key in line}
    losses = [
        (name.replace("_", " "), page.line_chart({name: _metric_curve(url, name)}, "step", ""))
        for name in sorted(logged.difference(_NOT_LOSSES))
    ]
    recalls = {
        f"{r['split']}, alpha {r['alpha']:g}": [e.get("recall@20", 0) for e in r["environments"]]
        for r in results
    }
    trade_off = _trade_off_curve(url)
    trade_offs = {"run": trade_off} if trade_off[0] else {}
    page.figures(
        (_VALIDATION, page.line_chart(validation, "step", config.train.select_metric)),
        *losses,
        (f"Recall@20 {_ONE_ENVIRONMENT}", _environment_chart(page, recalls)),
        (
            "IID against OOD Recall@20 under alpha from -0.5 to 1.25",
            page.line_chart(trade_offs, "IID", "OOD", dots=True),
        ),
    )


def _add_evaluations(page: HtmlPage, results: list[dict[str, Any]]) -> None:
    names = list(results[0]["metrics"])
    rows = []
    for result in results:
        metrics = result["metrics"]
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        rows.append([result["split"], f"{result['alpha']:g}", str(result["users"]), *cells])
    page.table(["split", "alpha", "users", *names], rows)


def _add_diagnoses(page: HtmlPage, found: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    if names:
        head = [name.removeprefix("diagnostics.").replace("_", " ") for name in names]
        rows = [
            [label, *(f"{values[n]:.3f}" if n in values else "" for n in names)]
            for label, values in found.items()
        ]
        page.heading("Diagnostics of the first seed", 3)
        page.table(["", *head], rows)


def _environment_chart(page: HtmlPage, recalls: Bars) -> str:
    environments = max(map(len, recalls.values()), default=0)
    return page.bar_chart([str(e) for e in range(environments)], recalls, "Recall@20")


def _trade_off_curve(url: str) -> Curve:
    """IID and OOD Recall@20 under each alpha; empty unless the run was analysed on both tests."""
    points = read_trade_off(url)
    iid, ood = (
        [p["metrics"]["recall@20"] for p in points if p["split"] == split]
        for split in ("test_iid", "test_ood")
    )
    return (iid, ood) if len(iid) == len(ood) else ([], [])


def _metric_curve(url: str, key: str, kind: str = "train") -> Curve:
    """Steps and values of a key of metrics.jsonl."""
    lines = [line for line in read_metrics(url) if line["kind"] == kind and key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _validation_curve(url: str) -> Curve:
    train = read_config(url).train
    return _metric_curve(url, train.select_metric, train.select_split)
