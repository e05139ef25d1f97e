"""Suites: one budget for all methods, choice by validation, resuming, and the reports."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cnsdiff_dist.cli import main
from cnsdiff_dist.comparison.results import best_other, finished_runs, verdict
from cnsdiff_dist.comparison.scheduler import best_trial
from cnsdiff_dist.comparison.significance import paired_bootstrap
from cnsdiff_dist.comparison.single_run import best_validation
from cnsdiff_dist.comparison.suite import jobs_of, load_suite, trials
from cnsdiff_dist.errors import UserError


def _suite(folder: Path, **changes: Any) -> str:
    tree: dict[str, Any] = {
        "name": "tiny",
        "out": str(folder / "out"),
        "ours": "ours",
        "seeds": [0, 1],
        "base": {"model.dim": 16, "train.epochs": 1, "train.batch": 512, "generator.hidden": 16},
        "datasets": {"data": {"url": str(folder / "data"), "select": "valid_ood"}},
        "methods": {"ours": {}, "dns": {"set": {"negatives.kind": "dns", "objective.kind": "bpr"}}},
        "search": {"kind": "grid", "trials": 2, "space": {"tables.lr": [0.02, 0.1]}},
    } | changes
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ours": "nobody"}, "ours \\(nobody\\) is none of the methods"),
        ({"sedes": [1]}, "unknown key sedes"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"methods": {"ours": {"only": ["moon"]}}}, "moon is none of the datasets"),
        ({"base": {"train.epocs": 3}}, "did you mean train.epochs"),
        ({"base": {"run.seed": 3}}, "comes from the suite's seeds"),
        ({"base": {"epochs": 3}}, "write section.key"),
        (
            {"methods": {"ours": {"search": {"tables.lr": [0.1]}}}},
            "its search has 1 points, not search.trials=2",
        ),
        (
            {
                "search": {
                    "kind": "grid",
                    "trials": 1,
                    "space": {"tables.lr": {"low": 0, "high": 1}},
                }
            },
            "a grid needs a list",
        ),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_suite(_suite(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_random_trials_are_distinct_repeatable_and_as_many_for_every_method(tmp_path: Path) -> None:
    space = {"tables.lr": {"low": 0.01, "high": 0.1, "log": True}, "model.layers": [0, 1, 2]}
    search = {"kind": "random", "trials": 5, "space": space}
    suite = load_suite(_suite(tmp_path, search=search))
    for method in suite.methods:
        found = trials(suite, ("data", method))
        assert found == trials(suite, ("data", method)) and len(found) == 5
        assert len({json.dumps(values) for values in found}) == 5
        assert all(0.01 <= values["tables.lr"] <= 0.1 for values in found)
    assert trials(suite, ("data", "ours")) != trials(suite, ("data", "dns"))


def test_the_best_trial_is_the_first_of_equals() -> None:
    assert best_trial({2: 0.5, 0: 0.1, 1: 0.5}) == 1
    assert best_trial({}) is None


def test_selection_reads_validation_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {select_split: valid_ood}\n")
    lines = [
        {"kind": "valid_ood", "step": 5, "recall@20": 0.2},
        {"kind": "valid_ood", "step": 9, "recall@20": 0.3},
        {"kind": "valid_iid", "step": 9, "recall@20": 0.8},
        {"kind": "test_ood", "step": 5, "recall@20": 0.9},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "val'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = best_validation(str(tmp_path))
    assert (found["step"], found["value"], found["split"]) == (9, 0.3, "valid_ood")


def test_bootstrap_is_the_share_of_resampled_means_beyond_zero() -> None:
    difference = np.random.default_rng(1).normal(0.1, 1, 200)
    generator = np.random.default_rng(0)
    means = [
        sum(difference[i] for i in generator.integers(200, size=200)) / 200 for _ in range(300)
    ]
    beyond = min(sum(m <= 0 for m in means), sum(m >= 0 for m in means))
    assert paired_bootstrap(difference, draws=300) == pytest.approx(2 * (beyond + 1) / 301)
    assert paired_bootstrap(np.zeros(50), draws=100) == 1.0
    assert paired_bootstrap(np.ones(50), draws=100) == pytest.approx(2 / 101)


@pytest.mark.distributed
def test_a_suite_from_end_to_end(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two methods, two trials, two seeds, on two processes; one run fails and the others go on."""
    methods = {
        "ours": {},
        "dns": {"set": {"negatives.kind": "dns", "objective.kind": "bpr"}},
        "broken": {
            "set": {"tables.lr": 1e30, "tables.optimizer": "sgd"},
            "search": {"model.layers": [0, 1]},
        },
    }
    data = {"data": {"url": dataset, "select": "valid_ood"}}
    path, out = _suite(tmp_path, methods=methods, datasets=data), tmp_path / "out"
    assert main(["compare", path, "--processes", "2"]) == 2
    said = capsys.readouterr()
    assert "training diverged" in said.err and said.err.count("\n") == 1
    assert all(
        "diverged" in why for why in json.loads((out / "failures.json").read_text()).values()
    )

    rows = pq.read_table(out / "runs.parquet").to_pylist()
    assert {row["method"] for row in rows} == {"ours", "dns"}
    assert len(rows) == 2 * (2 + 1) * 2 * 2  # methods x runs x tests x adjustments
    for method in ("ours", "dns"):
        mine = [row for row in rows if row["method"] == method and row["seed"] == 0]
        best = max(mine, key=lambda row: (row["selection"], -row["trial"]))["trial"]
        assert {row["trial"] for row in mine if row["chosen"]} == {best}
        chosen = [row for row in rows if row["method"] == method and row["chosen"]]
        assert {row["seed"] for row in chosen} == {0, 1}
    assert any(row["diagnostics.false_hard_negatives"] is not None for row in rows)

    suite = load_suite(path)
    runs = finished_runs(suite)
    assert best_other(suite, runs, "data") == "dns"
    found = verdict(suite, runs, "data", "calibrated")
    ratios = []
    for metric in ("recall@10", "recall@20", "ndcg@10", "ndcg@20"):
        chosen = [
            row
            for row in rows
            if row["chosen"] and row["split"] == "test_ood" and row["adjustment"] == "calibrated"
        ]
        sides = [
            np.mean([row[metric] for row in chosen if row["method"] == method])
            for method in ("ours", "dns")
        ]
        ratios.append(sides[0] / sides[1])
    assert found is not None and found.gain == pytest.approx(np.mean(ratios) - 1)

    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 5 and "| ours |" in (out / "table.md").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links) and "<script" not in page

    # Again: only what is missing is run.
    victim = Path(jobs_of(suite, ("data", "dns"))[0][0].url)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    (victim / "result.json").unlink()
    assert main(["compare", path]) == 2
    after = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    assert {p for p in after if after[p] != before.get(p)} == {victim / "result.json"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_suite_takes_its_workers_along(
    dataset: str, tmp_path: Path, number: signal.Signals
) -> None:
    path = _suite(
        tmp_path,
        datasets={"data": {"url": dataset, "select": "valid_ood"}},
        base={"train.epochs": 1000, "train.patience": 1000},
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "cnsdiff_dist", "compare", path, "--processes", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while len(list(tmp_path.rglob("metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "cnsdiff: error: interrupted; what was committed is kept"
    while any(alive := [Path(f"/proc/{worker}").exists() for worker in workers]):
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_the_report_of_a_run(dataset: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text("{model: {dim: 16}, train: {epochs: 1, log_every: 5}}")
    assert main(["train", str(config), f"data.url={dataset}", f"run.dir={run}"]) == 0
    assert main(["report", run]) == 0
    page = Path(run, "report.html").read_text()
    assert "Not evaluated yet" in page and "false hard negatives" in page
    assert main(["evaluate", run, "--split", "test_iid"]) == 0
    assert main(["report", run]) == 0
    assert "test_iid" in Path(run, "report.html").read_text()
    shutil.rmtree(run)
    assert main(["report", run]) == 2
