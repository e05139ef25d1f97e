"""Read what a run directory holds."""

import json
from pathlib import Path
from typing import Any


def metric_lines(run: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in metrics.jsonl, without a last line that is still being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if record["kind"] == kind]


def logged_steps(run: Path) -> list[int]:
    return [record["step"] for record in metric_lines(run, "train")]


def committed_steps(run: Path) -> list[int]:
    return sorted(int(p.parent.name[5:]) for p in run.glob("checkpoints/*/commit.json"))
