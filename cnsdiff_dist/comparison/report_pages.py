"""The HTML report of a suite, and of a single run."""

import json
from typing import Any

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.html_builder import Page
from cnsdiff_dist.comparison.results import (
    METRICS,
    SPLITS,
    Run,
    adjustments,
    best_other,
    chosen,
    diagnostics,
    significance,
    step_ms,
)
from cnsdiff_dist.comparison.single_run import read_trade_off
from cnsdiff_dist.comparison.suite import Suite
from cnsdiff_dist.comparison.tables import Stars, Table
from cnsdiff_dist.runs.directory import read_config, read_metrics

Curve = tuple[list[float], list[float]]
_NOT_LOSSES = ("step", "epoch", "kind", "time", "samples_per_second", "memory_gib", "total_steps")


def suite_page(suite: Suite, runs: list[Run], tables: list[Table], failures: dict[str, str]) -> str:
    """``tables`` as :func:`cnsdiff_dist.comparison.tables.tables_of` makes them."""
    page = Page(f"Comparison: {suite.name}")
    page.text(
        f"{len(runs)} runs. Every method had {suite.search.trials} trials per dataset on seed "
        f"{suite.seeds[0]}; the best by validation was run on seeds "
        f"{', '.join(map(str, suite.seeds))}. No test chooses anything. Mean ± standard deviation "
        f"over seeds; stars beside {suite.ours}: paired bootstrap over users against the best "
        "other (* p < 0.05, ** 0.01, *** 0.001). Orange: ours; blue: the best other by validation."
    )
    for table in tables[len(suite.datasets) :]:
        _show(page, suite, None, table)
    for dataset, table in zip(suite.datasets, tables, strict=False):
        _show(page, suite, best_other(suite, runs, dataset), table)
        first = {m: some[0] for m in suite.methods if (some := chosen(runs, dataset, m))}
        _figures(page, suite, first)
        if diagnoses := {m: diagnostics(run.url) for m, run in first.items()}:
            _diagnoses(page, diagnoses)
    if failures:
        page.heading("Runs that failed")
        page.table(["run", "why"], [[run, why] for run, why in failures.items()])
    return page.html()


def stars_of(suite: Suite, runs: list[Run]) -> Stars:
    """Marks beside ours where its difference to the best other is significant."""
    found = {}
    for dataset in suite.datasets:
        other = best_other(suite, runs, dataset)
        sides = [chosen(runs, dataset, m) for m in (suite.ours, other) if m]
        if len(sides) < 2:
            continue
        for adjustment in adjustments(runs):
            for split in SPLITS:
                for metric in METRICS:
                    p = significance(sides[0], sides[1], split, adjustment, metric)
                    mark = "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else ""
                    found[dataset, adjustment, split, metric] = mark
    return found


def _show(page: Page, suite: Suite, other: str | None, table: Table) -> None:
    page.heading(table.title)
    page.mark({suite.ours: "ours"} | ({other: "rival"} if other else {}))
    page.table(table.head, table.body)
    for note in table.notes:
        page.text(note)


def _figures(page: Page, suite: Suite, first: dict[str, Run]) -> None:
    """Figures of one dataset; of every method the chosen trial on the first seed."""
    trade_offs = {m: _trade_off(run.url) for m, run in first.items()}
    bars = {}
    for method in page.marked():
        entry = first[method].evaluation("test_ood", "calibrated") if method in first else None
        if entry:
            bars[method] = [e["recall@20"] for e in entry["environments"]]
    widest = max(map(len, bars.values()), default=0)
    times = {m: ms for m, run in first.items() if (ms := step_ms(run))}
    page.figures(
        ("IID against OOD Recall@20: a curve is one model under alpha from -0.5 to 1.25",
         page.curves({m: c for m, c in trade_offs.items() if c[0]}, "IID", "OOD", dots=True)),
        ("OOD Recall@20 (calibrated) where only one environment's items count, least popular first",
         page.bars([str(e) for e in range(widest)], bars, "Recall@20")),
        ("Validation over training, best alpha",
         page.curves({m: _validation(r.url) for m, r in first.items()}, "step", "Recall@20")),
        ("Hardness: the share of a row's negatives that outscore its positive",
         page.curves({m: _line(r.url, "hardness") for m, r in first.items()}, "step", "")),
        ("Median time of a training step, runs side by side",
         page.bars(list(times), {"step": list(times.values())}, "ms")),
    )  # fmt: skip


def _diagnoses(page: Page, found: dict[str, dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    if names:
        head = [name.removeprefix("diagnostics.").replace("_", " ") for name in names]
        rows = [
            [label, *(f"{values[n]:.3f}" if n in values else "" for n in names)]
            for label, values in found.items()
        ]
        page.heading("Diagnostics of the first seed", 3)
        page.table(["", *head], rows)


def run_page(url: str) -> str:
    """The page of one run, from what is in its directory."""
    config = read_config(url)
    page = Page(f"Run {storage.display(url)}")
    objective = config.objective
    page.text(
        f"Negatives {config.negatives.kind}; objective {objective.kind} on {objective.similarity}, "
        f"temperature {objective.temperature}; seed {config.run.seed}."
    )
    names = [n for n in storage.list_files(f"{url}/evaluations") if n.endswith(".json")]
    results = [json.loads(storage.read_text(f"{url}/evaluations/{n}")) for n in sorted(names)]
    if results:
        metrics = list(results[0]["metrics"])
        page.table(
            ["split", "alpha", "users", *metrics],
            [[r["split"], f"{r['alpha']:g}", str(r["users"]),
              *(f"{r['metrics'][m]:.4f}" if m in r["metrics"] else "" for m in metrics)]
             for r in results],
        )  # fmt: skip
    else:
        page.text("Not evaluated yet: cnsdiff evaluate RUN --split test_ood.")
    logged = {key for line in read_metrics(url) if line["kind"] == "train" for key in line}
    bars = {
        f"{r['split']}, alpha {r['alpha']:g}": [e.get("recall@20", 0) for e in r["environments"]]
        for r in results
    }
    widest = max(map(len, bars.values()), default=0)
    trade_off = _trade_off(url)
    page.figures(
        ("Validation over training, best alpha",
         page.curves({"validation": _validation(url)}, "step", config.train.select_metric)),
        *((name.replace("_", " "), page.curves({name: _line(url, name)}, "step", ""))
          for name in sorted(logged.difference(_NOT_LOSSES))),
        ("Recall@20 where only one environment's items count, least popular first",
         page.bars([str(e) for e in range(widest)], bars, "Recall@20")),
        ("IID against OOD Recall@20 under alpha from -0.5 to 1.25",
         page.curves({"run": trade_off} if trade_off[0] else {}, "IID", "OOD", dots=True)),
    )  # fmt: skip
    _diagnoses(page, {config.negatives.kind: diagnostics(url)})
    return page.html()


def _trade_off(url: str) -> Curve:
    points = read_trade_off(url)
    iid, ood = (
        [p["metrics"]["recall@20"] for p in points if p["split"] == split]
        for split in ("test_iid", "test_ood")
    )
    return (iid, ood) if len(iid) == len(ood) else ([], [])


def _line(url: str, key: str, kind: str = "train") -> Curve:
    lines = [line for line in read_metrics(url) if line["kind"] == kind and key in line]
    return [line["step"] for line in lines], [line[key] for line in lines]


def _validation(url: str) -> Curve:
    train = read_config(url).train
    return _line(url, train.select_metric, train.select_split)
