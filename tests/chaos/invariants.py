"""The checks that every run must pass, however it was disturbed: each returns what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.chaos.job import ROOT, Job
from tests.chaos.store import Run, folder_of
from tests.chaos.watch import Line
from tests.support.saved_state import distance, read_checkpoint

Place = tuple[int, int, int]
"""Epoch, step in the epoch, stream."""
_SHOWN = 3
_RELATIVE = 1e-3  # worlds of other sizes add floats in another order


def places(lines: list[Line]) -> Iterator[tuple[Place, str]]:
    for line in lines:
        for stream, digest in line.hashes.items():
            yield (line.epoch, line.step, int(stream)), digest


@dataclass
class Calm:
    """What a training does when nobody disturbs it."""

    hashes: dict[Place, str]
    steps_per_epoch: int
    total: int
    progress: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    losses: dict[int, float]
    exported: dict[str, bytes] | None

    def global_step(self, line: Line) -> int:
        return line.epoch * self.steps_per_epoch + line.step


def calm_of(job: Job, export: bool) -> Calm:
    lines = [line for lines in job.watcher.lines().values() for line in lines]
    per_epoch = max(line.step for line in lines) + 1
    last = max(line.epoch * per_epoch + line.step for line in lines) + 1
    tensors, progress = final_state(job.run, last, job.folder)
    exported = exported_bytes(job) if export else None
    losses = train_losses(job)
    return Calm(dict(places(lines)), per_epoch, last, progress, tensors, dict(losses), exported)


def check(job: Job, calm: Calm, exact: bool) -> list[str]:
    """Run all checks; ``exact`` says that the world always had the size of the calm run's."""
    found = [*batches(job, calm), *lineage(job, calm), *metrics(job, calm, exact)]
    found += _final(job, calm, exact)
    if exact and calm.exported is not None and exported_bytes(job) != calm.exported:
        found.append("the export differs from the calm run's")
    return found


def _some(what: str, found: list[Any]) -> list[str]:
    if not found:
        return []
    rest = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"{what}: {', '.join(map(str, found[:_SHOWN]))}{rest}"]


def batches(job: Job, calm: Calm) -> list[str]:
    """Every batch was trained on, always with the rows of the calm run."""
    lines = [line for lines in job.watcher.lines().values() for line in lines]
    seen = list(places(lines))
    wrong = sorted({place for place, digest in seen if calm.hashes.get(place) != digest})
    missing = sorted(calm.hashes.keys() - {place for place, _ in seen})
    return [
        *_some("other rows than in the calm run at (epoch, step, stream)", wrong),
        *_some("never trained on (epoch, step, stream)", missing),
    ]


def lineage(job: Job, calm: Calm) -> list[str]:
    """Every process continued from the newest commit and left no step out."""
    gaps, strange, old, torn = [], [], [], []
    reached, committed = 0, job.watcher.committed_steps() | {0}
    for attempt, lines in job.watcher.lines().items():
        steps = [calm.global_step(line) for line in lines]
        first, newest = steps[0], job.watcher.newest_commit(attempt)
        if first > reached:
            gaps.append(f"{attempt} began at {first}, {reached} was reached")
        if first not in committed:
            strange.append(f"{attempt} began at {first}")
        if first < newest and not job.overlaps:
            old.append(f"{attempt} began at {first}, {newest} was committed")
        if steps != list(range(first, first + len(steps))):
            torn.append(attempt)
        reached = max(reached, steps[-1] + 1)
    return [
        *_some("a gap", gaps),
        *_some("began where no checkpoint was committed", strange),
        *_some("did not go on from the newest checkpoint", old),
        *_some("left out or repeated a step within a process", torn),
    ]


def retrained(job: Job, calm: Calm) -> list[int]:
    """The number of steps that each restart trained again."""
    reached, found = 0, []
    for lines in job.watcher.lines().values():
        first, last = calm.global_step(lines[0]), calm.global_step(lines[-1]) + 1
        if lines[0].rank == 0 and reached:
            found.append(max(reached - first, 0))
        reached = max(reached, last)
    return found


def train_losses(job: Job) -> list[tuple[int, float]]:
    path = job.run.fetch("metrics.jsonl", job.folder / "metrics.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def metrics(job: Job, calm: Calm, exact: bool) -> list[str]:
    """metrics.jsonl has one line for each step, in order, with the loss of the calm run."""
    try:
        losses = train_losses(job)
    except ValueError as error:
        return [f"metrics.jsonl: a line that is not JSON: {error}"]
    steps = [step for step, _ in losses]
    repeated = sorted({step for step in steps if steps.count(step) > 1})
    missing = sorted(set(range(1, calm.total + 1)) - set(steps))
    other = [step for step, loss in losses if exact and loss != calm.losses.get(step)]
    return [
        *_some("metrics.jsonl repeats the steps", repeated),
        *_some("metrics.jsonl lacks the steps", missing),
        *_some("metrics.jsonl has other losses at the steps", other),
        *(["metrics.jsonl is out of order"] if not repeated and steps != sorted(steps) else []),
    ]


def final_state(
    run: Run, step: int, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What ``read_checkpoint`` returns for a step of any run; ``folder`` takes a copy."""
    return read_checkpoint(run.fetch(folder_of(step), folder / "last"))


def _final(job: Job, calm: Calm, exact: bool) -> list[str]:
    last = max(job.watcher.committed_steps(), default=0)
    if last != calm.total:
        return [f"the last commit is of step {last}, not {calm.total}"]
    tensors, progress = final_state(job.run, last, job.folder)
    if tensors.keys() != calm.tensors.keys():
        return [f"other tensors are saved: {sorted(tensors.keys() ^ calm.tensors.keys())}"]
    distances = {name: distance(tensors[name], calm.tensors[name]) for name in tensors}
    if not exact:
        job.notes.append(f"largest relative distance to the calm run {max(distances.values()):.1e}")
    limit = 0.0 if exact else _RELATIVE
    far = [f"{name} ({value:.1e})" for name, value in distances.items() if value > limit]
    found = _some("tensors of the last checkpoint differ from the calm run's", far)
    if exact and progress != calm.progress:
        found.append(f"the progress is {progress}, not {calm.progress}")
    return found


def exported_bytes(job: Job) -> dict[str, bytes]:
    """What `cnsdiff export` writes, by one process."""
    out = job.folder / "export"
    command = [sys.executable, "-m", "cnsdiff_dist", "export", job.run.url, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **job.environment}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True)
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.parquet"))}
