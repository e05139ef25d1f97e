"""How a run is doing, from what lies in its directory: also while it is trained, and from afar.

Nothing here waits for torch, and nothing writes.
"""

import json
import statistics
import time
from collections import Counter
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
from cnsdiff_dist.config import Config
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.directory import read_config, read_metrics

_PACE_LINES = 20


@dataclass(frozen=True)
class Saved:
    """A checkpoint's directory: what its commit says, or what is wrong with it."""

    step: int
    record: Record | None
    damage: str | None


def read_status(url: str) -> dict[str, Any]:
    """The state of a run, as JSON. Times are Unix seconds; what is not known is None.

    Raises:
        UserError: there is no run there, or it cannot be read.
    """
    config = read_config(url)
    environment, dataset = (_json(f"{url}/{name}.json") for name in ("environment", "dataset"))
    lines = [line for line in read_metrics(url) if _is_sound(line)]
    train = [line for line in lines if line["kind"] == "train"]
    saved = _saved(f"{url}/checkpoints")
    commits = [entry.record for entry in saved if entry.record]
    last = train[-1] if train else {}
    step = max([0, *(line["step"] for line in lines), *(c.progress.step for c in commits)])
    total = _number(last.get("total_steps"))
    finished = _finished(config, commits[-1], total) if commits else None
    return {
        "run": storage.display(url),
        "as_of": None if storage.is_local(url) or not lines else lines[-1]["time"],
        "dataset": dataset.get("name"),
        "method": f"{config.negatives.kind} negatives, {config.objective.kind} objective",
        "ranks": environment.get("world_size"),
        "device": environment.get("device"),
        "step": step,
        "total_steps": total,
        "epoch": _number(last.get("epoch")),
        "finished": finished,
        "last_sign_of_life": _last_sign(lines, commits),
        **{name: _number(last.get(name)) for name in _LOGGED},
        "data_wait_ratio": _data_wait(train),
        "remaining_seconds": None if finished else _remaining(train, step, total),
        "best": _best(config, lines),
        "checkpoints": _committed(saved, commits),
        "damaged": [{"step": s.step, "damage": s.damage} for s in saved if s.damage],
    }


_LOGGED = (
    "loss", "samples_per_second", "goodput", "memory_gib", "read_retries", "skipped_steps",
)  # fmt: skip


def _json(url: str) -> dict[str, Any]:
    """A small file of a run; nothing where it is missing or damaged, which is not ours to mend."""
    try:
        tree = json.loads(storage.read_text(url)) if storage.exists(url) else {}
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is one that a training wrote."""
    numbers = _number(line.get("step")), _number(line.get("time"))
    return None not in numbers and isinstance(line["step"], int) and isinstance(line["kind"], str)


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value if known and abs(value) < 2**53 else None  # not a NaN, nor beyond a double


def _saved(url: str) -> list[Saved]:
    """Checkpoints that were committed or set aside for damage, oldest first."""
    files = files_of(url)
    found = [_checkpoint(url, name, files) for name in committed_names(files)]
    for name, _, file in (path.partition("/") for path in files):
        if file == DAMAGED and NAME.match(name) and f"{name}/{COMMIT}" not in files:
            why = _json(f"{url}/{name}/{DAMAGED}").get("damage", "unknown")
            found.append(Saved(step_of(name), None, f"set aside: {why}"))
    return sorted(filter(None, found), key=lambda entry: entry.step)


def _checkpoint(url: str, name: str, files: list[str]) -> Saved | None:
    """A committed one, whose files are counted, not read; None if the training has just deleted
    it."""
    where = f"{url}/{name}"
    try:
        commit = Commit(step_of(name), where, read_commit(where))
    except UserError:
        if storage.exists(f"{where}/{COMMIT}"):
            raise
        return None
    if damage := record_damage(commit):
        return Saved(commit.step, None, damage)
    missing = [file for file in commit.checked.files if f"{name}/{file}" not in files]
    if missing and storage.exists(f"{where}/{COMMIT}"):
        return Saved(commit.step, None, f"{missing[0]} is missing")
    return None if missing else Saved(commit.step, commit.checked, None)


def _committed(saved: list[Saved], commits: list[Record]) -> list[dict[str, Any]]:
    best = commits[-1].progress.best_step if commits else None
    return [
        {
            "step": entry.step, "time": entry.record.time, "bytes": entry.record.bytes,
            "best": entry.step == best,
        }
        for entry in saved if entry.record
    ]  # fmt: skip


def _finished(config: Config, newest: Record, total: float | None) -> str | None:
    """Why the training ended, in words; None while it has not."""
    progress, patience = newest.progress, config.train.patience
    if total is not None and progress.step >= total:
        return "all steps are done"
    if progress.evaluations_since_best >= patience:
        return f"{patience} evaluations without a better one (train.patience)"
    return None


def _last_sign(lines: list[dict[str, Any]], commits: list[Record]) -> dict[str, Any] | None:
    signs = [(line["time"], f"metrics of step {line['step']}") for line in lines[-1:]]
    signs += [
        (commit.time, f"checkpoint of step {commit.progress.step}")
        for commit in commits[-1:] if commit.time is not None
    ]  # fmt: skip
    if not signs:
        return None
    when, what = max(signs)
    return {"time": when, "seconds_ago": ago(when), "what": what}


def ago(when: float) -> float:
    """Seconds since a Unix time; the clock of another machine may be ahead."""
    return max(0.0, time.time() - when)


def _data_wait(train: list[dict[str, Any]]) -> float | None:
    """The share of the time between the last two lines that steps waited for their rows."""
    if len(train) < 2 or (waited := _number(train[-1].get("data_wait_seconds"))) is None:
        return None
    seconds = train[-1]["time"] - train[-2]["time"]
    return min(1.0, waited / seconds) if seconds > 0 else None


def _remaining(train: list[dict[str, Any]], step: int, total: float | None) -> float | None:
    """Seconds that the steps left would take at the median pace of the last lines: a restart
    between two of them is not counted, nor are the evaluations to come."""
    recent = train[-_PACE_LINES:]
    paces = [
        (b["time"] - a["time"]) / (b["step"] - a["step"])
        for a, b in pairwise(recent) if b["step"] > a["step"]
    ]  # fmt: skip
    if not paces or total is None:
        return None
    return max(0.0, statistics.median(paces) * (total - step))


def _best(config: Config, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    split, metric = config.train.select_split, config.train.select_metric
    found = [line for line in lines if line["kind"] == split]
    values = [(_number(line.get(metric)), line["step"]) for line in found]
    known = [(value, -step) for value, step in values if value is not None]
    if not known:
        return None
    value, step = max(known)  # the first of equals
    after = Counter(line["step"] > -step for line in found)[True]
    return {
        "split": split, "metric": metric, "value": value, "step": -step,
        "evaluations_since": after,
    }  # fmt: skip
