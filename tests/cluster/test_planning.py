"""`cnsdiff plan`: what fits a cluster, and what would."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest

PLAN = ["plan", "configs/demo.yaml"]
H100 = ["--nodes", "4", "--gpus-per-node", "8", "--device", "h100"]


def _counts(users: str, items: str, edges: str) -> list[str]:
    return ["--users", users, "--items", items, "--edges", edges]


def test_two_billion_rows_plan_on_32_gpus(capsys: Any) -> None:
    words = [*PLAN, "model.dim=128", *H100, *_counts("2e9", "1e8", "2e10"), "--json"]
    assert main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["placement"] == "device"
    (table,) = [table for table in plan["tables"] if table["name"] == "user"]
    assert len(table["shards"]) == 32 and sum(rows for _, rows, _ in table["shards"]) == 2e9
    held = plan["device"]["tables and optimizer"]
    assert held == pytest.approx((2e9 + 1e8) * (128 * 4 + 4) / 32, rel=0.01)
    assert "data.streams=32" in plan["changes"][0]


def test_what_does_not_fit_says_what_would(capsys: Any) -> None:
    words = [*PLAN, "model.dim=128", "data.streams=32", *H100, *_counts("5e9", "1e8", "2e10")]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert "does not fit the GPU memory" in line and "--nodes 8" in line
    assert "fp16" in line and "Traceback" not in line


@pytest.mark.parametrize("word", ["tables.placement=uvm", "tables.optimizer=adam"])
def test_what_only_gpus_do_is_planned_without_one(capsys: Any, word: str) -> None:
    words = [*PLAN, word, "data.streams=32", *H100, *_counts("1e6", "1e5", "1e7")]
    assert main(words) == 0
    assert "it fits" in capsys.readouterr().out


def test_a_plan_needs_sizes(capsys: Any) -> None:
    assert main([*PLAN, "--users", "5"]) == 2
    assert "give all three or none" in capsys.readouterr().err
    assert main([*PLAN, "data.url=/nowhere"]) == 2
    assert "no manifest.json here" in capsys.readouterr().err


def test_a_plan_samples_the_datasets_own_blocks(dataset: str, capsys: Any) -> None:
    words = [f"data.url={dataset}", "model.propagation=sampled", "model.fan_out=[3,2]"]
    cpu = ["--device", "cpu", "--gpus-per-node", "2"]
    assert main([*PLAN, *words, *cpu]) == 0
    shown = capsys.readouterr().out
    assert "it fits" in shown and "tables and optimizer" in shown
    assert main([*PLAN, *words, *cpu, "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    manifest = load_manifest(dataset)
    assert 0 < sizes["block_nodes"] <= manifest.users + manifest.items
    assert sizes["edges"] == manifest.graph.edges


@pytest.mark.slow
@pytest.mark.distributed
def test_the_planned_memory_is_what_a_run_uses(dataset: str, tmp_path: Path) -> None:
    """Within 15 %, where rows of 8,192 floats outweigh what a process starts with."""
    words = [f"data.url={dataset}", "model.dim=8192", "model.propagation=sampled"]
    words += ["model.fan_out=[3,2]", "train.max_steps=3", "train.batch=64", "generator.hidden=16"]
    words += ["negatives.kind=in_batch", f"run.dir={tmp_path / 'run'}"]
    plan = [sys.executable, "-m", "cnsdiff_dist", *PLAN, *words, "--device", "cpu", "--json"]
    planned = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
    expected = sum(json.loads(planned)["host"].values()) / 2**30
    command = [sys.executable, "-m", "cnsdiff_dist", "train", "configs/demo.yaml", *words]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (used,) = re.findall(r"at most ([0-9.]+) GiB a rank", shown)
    assert float(used) == pytest.approx(expected, rel=0.15)
