"""How a run is doing, from the files of its directory alone, local or remote.

The run may be training meanwhile. Nothing here imports torch, and nothing here writes.
"""

import json
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.commit import (
    COMMIT,
    DAMAGED,
    NAME,
    Commit,
    Record,
    committed_names,
    files_of,
    read_commit,
    record_damage,
    step_of,
)
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.records import DATASET, ENVIRONMENT, RunSettings, read_metrics, read_settings

_PACE_LINES = 20
_AS_LOGGED = "loss samples_per_second goodput memory_gib read_retries skipped_steps".split()


def read_status(url: str) -> dict[str, Any]:
    """Return the state of a run, for JSON. Times are Unix seconds; None stands for unknown.

    Raises:
        UserError: there is no run there, or it cannot be read.
    """
    settings = read_settings(url)
    environment, dataset = (_read_object(f"{url}/{name}") for name in (ENVIRONMENT, DATASET))
    lines = [line for line in read_metrics(url) if _is_valid(line)]
    checkpoints = _checkpoints(f"{url}/checkpoints")
    commits = [found.record for found in checkpoints if found.record]
    damaged = [found for found in checkpoints if found.damage]
    return {
        "run": storage.display(url),
        "as_of": None if storage.is_local(url) or not lines else lines[-1]["time"],
        "dataset": dataset.get("name"),
        "method": f"{settings.negatives} negatives, {settings.objective} objective",
        "ranks": environment.get("world_size"),
        "device": environment.get("device"),
        **_progress(settings, lines, commits),
        "best": _best_evaluation(settings, lines),
        "checkpoints": _committed_as_json(checkpoints),
        "damaged": [{"step": found.step, "damage": found.damage} for found in damaged],
    }


def _read_object(url: str) -> dict[str, Any]:
    """Read a JSON object; an empty one stands for a file that is missing or damaged."""
    try:
        tree = json.loads(storage.read_text(url)) if storage.exists(url) else {}
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_valid(line: dict[str, Any]) -> bool:
    """Whether a training can have written this line of metrics.jsonl."""
    numbers = _number(line.get("step")), _number(line.get("time"))
    return None not in numbers and isinstance(line["step"], int) and isinstance(line["kind"], str)


def _number(value: Any) -> float | None:
    """Return the value if it is a number below 2^53, up to which a double holds every integer.

    None for everything else, NaN included.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 2**53 else None


# --- checkpoints ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckpointState:
    """A checkpoint that was committed or set aside: its record, or what is wrong with it."""

    step: int
    record: Record | None
    damage: str | None


def _checkpoints(url: str) -> list[CheckpointState]:
    """Return the checkpoints that were committed or set aside for damage, oldest first."""
    files = files_of(url)
    found = [_committed_checkpoint(url, name, files) for name in committed_names(files)]
    for name, _, file in (path.partition("/") for path in files):
        if file == DAMAGED and NAME.match(name) and f"{name}/{COMMIT}" not in files:
            why = _read_object(f"{url}/{name}/{DAMAGED}").get("damage", "unknown")
            found.append(CheckpointState(step_of(name), None, f"set aside: {why}"))
    return sorted(filter(None, found), key=lambda state: state.step)


def _committed_checkpoint(url: str, name: str, files: list[str]) -> CheckpointState | None:
    """Check a committed checkpoint without reading its files; None if it was just deleted."""
    where = f"{url}/{name}"
    try:
        commit = Commit(step_of(name), where, read_commit(where))
    except UserError:
        if storage.exists(f"{where}/{COMMIT}"):
            raise
        return None
    if damage := record_damage(commit):
        return CheckpointState(commit.step, None, damage)
    missing = [file for file in commit.checked.files if f"{name}/{file}" not in files]
    if missing and storage.exists(f"{where}/{COMMIT}"):
        return CheckpointState(commit.step, None, f"{missing[0]} is missing")
    return None if missing else CheckpointState(commit.step, commit.checked, None)


def _committed_as_json(checkpoints: list[CheckpointState]) -> list[dict[str, Any]]:
    committed = [(state.step, state.record) for state in checkpoints if state.record]
    best_step = committed[-1][1].progress.best_step if committed else None
    return [
        {"step": step, "time": record.time, "bytes": record.bytes, "best": step == best_step}
        for step, record in committed
    ]


# --- progress -------------------------------------------------------------------------------------


def _progress(
    settings: RunSettings, lines: list[dict[str, Any]], commits: list[Record]
) -> dict[str, Any]:
    """Return how far the run is and how fast it goes, from its metrics and its checkpoints."""
    train = [line for line in lines if line["kind"] == "train"]
    last = train[-1] if train else {}
    steps = [line["step"] for line in lines] + [commit.progress.step for commit in commits]
    step, total = max([0, *steps]), _number(last.get("total_steps"))
    finished = _why_it_ended(settings, commits[-1], total) if commits else None
    return {
        "step": step,
        "total_steps": total,
        "epoch": _number(last.get("epoch")),
        "finished": finished,
        "last_sign_of_life": _last_sign_of_life(lines, commits),
        **{name: _number(last.get(name)) for name in _AS_LOGGED},
        "data_wait_ratio": _data_wait_ratio(train),
        "remaining_seconds": None if finished else _remaining_seconds(train, step, total),
    }


def _why_it_ended(settings: RunSettings, newest: Record, total: float | None) -> str | None:
    """Say why the training ended; None if it has not."""
    progress, patience = newest.progress, settings.train.patience
    if total is not None and progress.step >= total:
        return "all steps are done"
    if progress.evaluations_since_best >= patience:
        return f"{patience} evaluations without a better one (train.patience)"
    return None


def _last_sign_of_life(lines: list[dict[str, Any]], commits: list[Record]) -> dict[str, Any] | None:
    """Return the newest thing that the training wrote: a line of metrics or a checkpoint."""
    signs = [(line["time"], f"metrics of step {line['step']}") for line in lines[-1:]]
    for commit in commits[-1:]:
        if commit.time is not None:
            signs.append((commit.time, f"checkpoint of step {commit.progress.step}"))
    if not signs:
        return None
    when, what = max(signs)
    return {"time": when, "seconds_ago": ago(when), "what": what}


def ago(when: float) -> float:
    """Return the seconds since a Unix time; 0 if the clock that gave it is ahead of this one."""
    return max(0.0, time.time() - when)


def _data_wait_ratio(train: list[dict[str, Any]]) -> float | None:
    """Return the share of the time between the last two lines that steps waited for their rows."""
    if len(train) < 2 or (waited := _number(train[-1].get("data_wait_seconds"))) is None:
        return None
    seconds = train[-1]["time"] - train[-2]["time"]
    return min(1.0, waited / seconds) if seconds > 0 else None


def _remaining_seconds(train: list[dict[str, Any]], step: int, total: float | None) -> float | None:
    """Estimate the time of the steps that are left, without the evaluations to come.

    The pace is the median over the last lines, so that a restart between two lines does not count.
    """
    recent = train[-_PACE_LINES:]
    paces = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in pairwise(recent)
        if after["step"] > before["step"]
    ]
    if not paces or total is None:
        return None
    return max(0.0, statistics.median(paces) * (total - step))


def _best_evaluation(settings: RunSettings, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best evaluation of the split and metric that select; the first of equal ones."""
    split, metric = settings.train.select_split, settings.train.select_metric
    found = [(_number(line.get(metric)), line["step"]) for line in lines if line["kind"] == split]
    known = [(value, step) for value, step in found if value is not None]
    if not known:
        return None
    value, best_step = max(known, key=lambda pair: (pair[0], -pair[1]))
    return {
        "split": split,
        "metric": metric,
        "value": value,
        "step": best_step,
        "evaluations_since": sum(step > best_step for _, step in found),
    }
