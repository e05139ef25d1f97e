"""`cnsdiff status`: a run before, while and after it trains, in a bucket, and damaged."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.runs.directory import write_identity
from cnsdiff_dist.runs.status import read_status
from tests.support.observing import Watched
from tests.support.runs import committed_steps, metric_lines
from tests.support.s3server import SECRET
from tests.support.small import small_config, write_config
from tests.support.trainers import trained_run

Capsys = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


def _status(run: Path | str, capsys: Capsys) -> tuple[str, dict[str, Any]]:
    """What `cnsdiff status` prints as text and as JSON."""
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert main(["status", str(run), "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def finished(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(dataset, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_status_of_a_run_before_its_first_step(
    dataset: str, tmp_path: Path, world: World, capsys: Capsys
) -> None:
    write_identity(small_config(dataset, tmp_path / "run"), load_manifest(dataset), world)
    text, status = _status(tmp_path / "run", capsys)
    assert status["step"] == 0 and status["finished"] is None and not status["checkpoints"]
    assert "no step logged yet" in text and "none committed yet" in text
    assert re.search(r"^ranks +1 on cpu$", text, re.M)


def test_status_of_a_run_that_trains(watched: Watched) -> None:
    status = watched.running
    assert 0 < status["step"] <= watched.preempted["step"] < status["total_steps"] == 36_000
    assert status["finished"] is None and status["last_sign_of_life"]["seconds_ago"] < 60
    (line,) = (x for x in metric_lines(watched.run, "train") if x["loss"] == status["loss"])
    assert line["goodput"] == status["goodput"] and line["memory_gib"] == status["memory_gib"]
    assert status["remaining_seconds"] > 0 and 0 <= status["data_wait_ratio"] <= 1
    committed = [entry["step"] for entry in status["checkpoints"]]
    assert len(committed) > 3 and set(committed) <= set(committed_steps(watched.run))


def test_status_of_a_preempted_run(watched: Watched, capsys: Capsys) -> None:
    text, status = _status(watched.run, capsys)
    newest = committed_steps(watched.run)[-1]
    assert status["step"] == status["checkpoints"][-1]["step"] == newest
    assert re.search(rf"^progress +step {newest:,} of 36,000 \(\d+ %\), epoch \d+$", text, re.M)
    assert re.search(r"^state +not finished; last sign of life \d+ .*ago \(", text, re.M)
    assert re.search(r"^remaining +\d+ .* at this pace$", text, re.M)
    assert "retries" not in text and "skipped" not in text and "as of" not in text


def test_status_of_a_finished_run(finished: Path, capsys: Capsys) -> None:
    text, status = _status(finished, capsys)
    (best,) = (entry for entry in status["checkpoints"] if entry["best"])
    lines = {line["step"]: line["recall@20"] for line in metric_lines(finished, "valid_iid")}
    assert status["best"]["value"] == max(lines.values()) == lines[best["step"]]
    assert status["best"]["step"] == best["step"]
    assert status["finished"] == "all steps are done" and status["remaining_seconds"] is None
    assert "(100 %)" in text and "finished: all steps are done" in text and "(best)" in text
    for entry in status["checkpoints"]:
        folder = finished / f"checkpoints/step-{entry['step']:08d}"
        files = [path for path in folder.iterdir() if path.name != "commit.json"]
        assert entry["bytes"] == sum(path.stat().st_size for path in files)


def test_status_of_a_run_whose_patience_is_over(
    dataset: str, tmp_path: Path, capsys: Capsys
) -> None:
    train = {"epochs": 90, "patience": 1, "evaluations_per_epoch": 4}
    tables = {"lr": 1e-6}
    config = write_config(
        tmp_path / "small.yaml", dataset, tmp_path / "run", train=train, tables=tables
    )
    assert main(["train", config]) == 0
    text, status = _status(tmp_path / "run", capsys)
    assert status["step"] < status["total_steps"] and status["best"]["evaluations_since"] == 1
    assert "finished: 1 evaluations without a better one (train.patience)" in text


def test_status_waits_for_no_torch(finished: Path) -> None:
    code = (
        "import sys; from cnsdiff_dist.cli import main; assert main(sys.argv[1:]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", str(finished)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_status_on_a_terminal_is_rich(
    finished: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["status", str(finished)]) == 0
    assert "\x1b[1mprogress" in capsys.readouterr().out


def test_status_names_damaged_checkpoints(copied: Path, world: World, capsys: Capsys) -> None:
    older, newest = committed_steps(copied)
    assert _status(copied, capsys)[1]["damaged"] == []
    commit = copied / f"checkpoints/step-{newest:08d}/commit.json"
    whole = commit.read_text()
    commit.write_text(whole.replace('"best"', '"worst"'))
    text, status = _status(copied, capsys)
    assert [entry["step"] for entry in status["checkpoints"]] == [older]
    assert f"step {newest}: commit.json is not what was written" in text
    commit.write_text(whole)
    table = next(commit.parent.glob("*.distcp"))
    table.rename(copied / "elsewhere")
    assert f"step {newest}: {table.name} is missing" in _status(copied, capsys)[0]
    checkpoints = Checkpoints(str(copied), world)
    checkpoints.set_aside(checkpoints.committed()[-1], "a flipped bit\x1b[2J")
    text, status = _status(copied, capsys)
    assert f"step {newest}: set aside: a flipped bit?[2J" in text
    assert status["finished"] is None  # the step is to be trained again


_ODD = [
    '{"step": 9',
    "[]",
    "7",
    '{"kind": 1, "step": 2, "time": 3}',
    '{"kind": "train"}',
    '{"kind": "train", "step": "a", "time": 1}',
    '{"kind": "train", "step": 1e400, "time": 1}',
    '{"kind": "train", "step": 25, "time": 1e300}',
    '{"kind": "train", "step": 25, "time": NaN}',
    '{"kind": "train", "step": 25, "time": 1, "loss": "x", "total_steps": [], "epoch": "\\u001b["}',
    '{"kind": "valid_iid", "step": 25, "time": 1, "recall@20": null}',
    "[" * 5000,
]


@pytest.mark.parametrize("odd", _ODD, ids=range(len(_ODD)))
def test_status_of_metrics_that_are_torn_or_mean_harm(
    odd: str, copied: Path, capsys: Capsys
) -> None:
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(odd)
    text, status = _status(copied, capsys)
    assert status["step"] in (24, 25) and status["best"] is not None
    assert "\x1b" not in text


def test_status_where_there_is_no_run(tmp_path: Path, capsys: Capsys) -> None:
    for folder, why in ((tmp_path, "no run here"), (tmp_path / "none", "no run here")):
        assert main(["status", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and why in error and str(folder) in error


def test_status_of_bytes_that_are_no_text(copied: Path, capsys: Capsys) -> None:
    (copied / "metrics.jsonl").write_bytes(b"\xff\xfe")
    capsys.readouterr()
    assert main(["status", str(copied)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metrics.jsonl: not UTF-8" in error


@pytest.mark.s3
def test_status_of_a_run_in_a_bucket(
    bucket: str,
    finished: Path,
    new_clients: Callable[[], None],
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = f"{bucket}/runs/observed"
    for path in sorted(finished.rglob("*")):
        if path.is_file():
            storage.upload(path, f"{run}/{path.relative_to(finished)}")
    text, status = _status(run, capsys)
    here = read_status(str(finished))
    assert re.search(r"^as of +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; evaluations and", text, re.M)
    changing = {"run": run, "as_of": metric_lines(finished, "valid_iid")[-1]["time"]}
    for found in (here, status):
        found["last_sign_of_life"].pop("seconds_ago")
    assert status == {**here, **changing}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    new_clients()
    assert main(["status", run]) == 75
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the host does not answer" in error and SECRET not in error
