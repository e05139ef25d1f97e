"""Trainings that are disturbed on purpose; ``python -m tests.chaos`` disturbs them for longer."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chaos.invariants import Calm, batches, lineage, metrics
from tests.chaos.job import ROOT
from tests.chaos.machine_faults import FAKETIME
from tests.chaos.watch import Line
from tests.support import hosts
from tests.support.saved_state import distance


def chaos(tmp_path: Path, seconds: float, *words: str) -> list[dict[str, Any]]:
    """Run the tool as a process, which ends what it started, and return its report's scenarios."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.chaos", "--out", str(out), "--work", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # then it cleans up
            process.communicate(timeout=60)
    assert process.returncode == 0, said
    return json.loads(out.read_text())["scenarios"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_killed_at_random_it_learns_the_same(tmp_path: Path) -> None:
    (result,) = chaos(tmp_path, 300, "--faults", "kill-rank", "--kills", "3")
    assert result["disturbances"] == 3 and result["recovery_seconds"]["count"] > 0


_MOUNT = "unshare --mount mount -t tmpfs tmpfs /mnt"
NEEDS = {"clock": f"test -e {FAKETIME}", "disk-full": _MOUNT}


def _skip_where_it_cannot_be_done(fault: str) -> None:
    if fault in ("nodes", "link") and (why := hosts.why_not()):
        pytest.skip(f"{fault} {why}")
    command = NEEDS.get(fault, "true")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{fault} needs: {command} ({done.stderr.strip()})")


# The faults of one case are compared with one calm run.
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1750)
@pytest.mark.parametrize(
    "faults",
    [
        "kill-in-checkpoint kill-agent stop-rank sigterm damage",
        "clock",
        "disk-full",
        "nodes link",
        pytest.param("s3-kill-rank", marks=pytest.mark.s3),
        pytest.param("s3-pause", marks=pytest.mark.s3),
        pytest.param("s3-kill", marks=pytest.mark.s3),
        pytest.param("s3-network", marks=pytest.mark.s3),
    ],
)
def test_trouble_is_survived(faults: str, tmp_path: Path) -> None:
    names = faults.split()
    for name in names:
        _skip_where_it_cannot_be_done(name)
    report = chaos(tmp_path, 1600, "--faults", *names, "--kills", "3")
    assert [result["fault"] for result in report] == names


# --- the checker itself ---------------------------------------------------------------------


class _Watched:
    """Stands for a job: two processes of one rank, the second of which began at step 2."""

    def __init__(self, folder: Path) -> None:
        self.traces = {
            "1.0.7": [line("1.0.7", step) for step in range(4)],
            "1.1.8": [line("1.1.8", step) for step in range(2, 6)],
        }
        self.committed, self.metrics = {2, 4, 6}, folder / "metrics.jsonl"
        self.watcher, self.run, self.folder, self.overlaps = self, self, folder, False
        self.write_metrics(range(1, 7))

    def write_metrics(self, steps: Iterable[int]) -> None:
        records = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in steps]
        self.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))

    def lines(self) -> dict[str, list[Line]]:
        return self.traces

    def committed_steps(self) -> set[int]:
        return self.committed

    def newest_commit(self, attempt: str) -> int:
        return 0 if attempt == "1.0.7" else 2

    def fetch(self, name: str, target: Path) -> Path:
        return self.metrics


def line(attempt: str, at: int) -> Line:
    epoch, step = divmod(at, 3)
    return Line(attempt, 0, 1, epoch, step, {"0": f"hash {at}", "1": f"other {at}"})


def wrong(watched: _Watched) -> str:
    places = {(s // 3, s % 3, c): f"{('hash', 'other')[c]} {s}" for s in range(6) for c in (0, 1)}
    calm = Calm(places, 3, 6, {}, {}, {step: 1.0 / step for step in range(1, 7)}, None)
    job: Any = watched
    found = [*batches(job, calm), *lineage(job, calm), *metrics(job, calm, exact=True)]
    return "; ".join(found)


def test_a_good_run_has_nothing_wrong(tmp_path: Path) -> None:
    assert wrong(_Watched(tmp_path)) == ""


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda w: w.traces["1.1.8"][1].hashes.update({"1": "?"}), "other rows .*\\(1, 0, 1\\)"),
        (lambda w: w.traces["1.1.8"].pop(), r"never trained on .*\(1, 2, 0\)"),
        (lambda w: w.traces["1.0.7"].__delitem__(slice(1, 4)), "a gap: 1.1.8 began at 2, 1 was"),
        (lambda w: w.traces["1.1.8"].pop(1), "left out or repeated a step .*1.1.8"),
        (lambda w: w.committed.discard(2), "no checkpoint was committed: 1.1.8 began at 2"),
        (lambda w: setattr(w, "newest_commit", lambda _: 4), "newest .*2, 4 was committed"),
        (lambda w: w.write_metrics([1, 2, 3, 3, 4, 5, 6]), "repeats the steps: 3"),
        (lambda w: w.write_metrics([1, 2, 4, 5, 6]), "lacks the steps: 3"),
        (lambda w: w.write_metrics([2, 1, 3, 4, 5, 6]), "out of order"),
        (lambda w: w.metrics.write_text('{"kind": "tra'), "not JSON"),
    ],
)
def test_the_checker_sees(spoil: Callable[[_Watched], Any], complaint: str, tmp_path: Path) -> None:
    watched = _Watched(tmp_path)
    spoil(watched)
    assert re.search(complaint, wrong(watched))


def test_tensors_are_the_same_to_the_bit_or_not() -> None:
    one = torch.tensor([1.0, 2.0])
    assert distance(one, one.clone()) == 0.0
    assert 0 < distance(one, torch.nextafter(one, 2 * one)) < 1e-6
