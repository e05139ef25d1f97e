"""Log lines: text by default, and one JSON object a line on demand."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cnsdiff_dist import logs
from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import _metrics_server
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.runs.reporter import Screen
from tests.support.observing import samples, scrape
from tests.support.ports import free_port
from tests.support.processes import long_training, rank_process, started, torchrun_words, wait_for
from tests.support.runs import committed_steps, metric_lines
from tests.support.s3server import KEY, SECRET
from tests.support.small import small_config, write_config

Capsys = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
_FIELDS = ["time", "level", "rank", "run", "step", "restart", "message"]


def _records(text: str) -> list[dict[str, Any]]:
    """The records of JSON lines, after a check of their common fields."""
    found = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    for record in found:
        assert list(record)[: len(_FIELDS)] == _FIELDS
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
        assert record["level"] in ("info", "warning", "error", "critical")
        assert isinstance(record["rank"], int) and isinstance(record["restart"], int)
    return found


@pytest.mark.distributed
def test_all_that_two_ranks_print_is_json_over_a_restart(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        logs.VARIABLE: "json",
        "FORCE_COLOR": "1",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    run, words = long_training(dataset, tmp_path, checkpoint={"every_steps": 5})
    out, port = tmp_path / "out", free_port()
    words.append(f"run.metrics_port={port}")
    options = ["--max-restarts", "1", "--monitor-interval", "0.1", "--log-dir", str(out)]
    with started(*torchrun_words(*options, "--redirects", "3", *words)) as process:
        wait_for(lambda: committed_steps(run))
        rank_process(process, 1).kill()
        printed = "*/attempt_1/0/stdout.log"
        wait_for(lambda: any("valid_iid" in path.read_text() for path in out.glob(printed)))
        scraped = samples(scrape(port))  # rank 0 has it again, and rank 1 does not ask for it
        rank_process(process, 1).send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
    assert scraped["cnsdiff_run_info"][0][0]["world_size"] == "2"
    assert scraped["cnsdiff_last_checkpoint_step"][0][1] >= 5
    texts = [path.read_text() for path in out.rglob("std*.log")]
    records = [record for text in texts for record in _records(text)]
    assert len(texts) == 8 and not any(SECRET in text or KEY in text for text in texts)
    assert all(record["run"] == str(run) for record in records)
    assert {(r["rank"], r["restart"]) for r in records} == {(0, 0), (0, 1), (1, 1)}
    metrics = [r for r in records if r.get("kind") == "train" and r["restart"] == 1]
    logged = {line["step"]: line for line in metric_lines(run, "train")}
    for record in metrics:
        line = logged[record["step"]]
        assert all(record[name] == line[name] for name in line if name != "time")
    assert metrics and any(r.get("kind") == "valid_iid" and "recall@20" in r for r in records)
    errors = [r for r in records if r["level"] == "error"]
    assert any("lost rank 1" in r["message"] and r["step"] > 0 for r in errors)
    assert sum("preempted: checkpointed at step" in r["message"] for r in errors) == 2
    assert any("resumed from" in r["message"] for r in records)


def test_a_bug_and_a_librarys_record_are_a_line_each() -> None:
    code = """
import logging
from cnsdiff_dist import logs
logs.take_over()
logs.write("odd", loss=float("nan"))
logging.getLogger("botocore").warning("two\\nlines %s", 1)
raise RuntimeError("a bug")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, logs.VARIABLE: "json", "RANK": "3"},
    )
    assert done.returncode == 1
    (odd,), (record, bug) = _records(done.stdout), _records(done.stderr)
    assert odd["loss"] is None and odd["rank"] == 3
    assert (record["level"], record["logger"]) == ("warning", "botocore")
    assert record["message"] == "two\nlines 1"
    assert bug["level"] == "critical" and bug["message"] == "RuntimeError: a bug"
    assert bug["traceback"].startswith("Traceback (most recent call last)")


def test_leaving_at_once_is_a_line_too() -> None:
    code = "from tests.support.processes import hang; hang(1, asked=True)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env={**os.environ, logs.VARIABLE: "json"},
    )
    (record,) = _records(done.stderr)
    assert done.returncode == 75 and "run.grace_seconds (1 s) are over" in record["message"]


def test_text_is_the_default_and_the_number_fields_are_not_in_it(capsys: Capsys) -> None:
    Screen().say("epoch 0  [1]  step 5/24", "warning", {"loss": 4.9})
    assert capsys.readouterr().out == "epoch 0  [1]  step 5/24\n"


def test_another_log_format_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    assert main(["train", "configs/demo.yaml"]) == 2
    assert capsys.readouterr().err == "cnsdiff: error: CNSDIFF_LOG_FORMAT=xml: text or json\n"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_password_in_a_url_is_in_no_output(
    form: str,
    dataset: str,
    tmp_path: Path,
    world: World,
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(logs.VARIABLE, form)
    url = f"http://{KEY}:{SECRET}@127.0.0.1:9/run"
    config = write_config(tmp_path / "small.yaml", dataset, tmp_path / "run")
    assert main(["train", config, f"run.dir={url}"]) == 2
    assert main(["status", url]) == 2
    server = _metrics_server(small_config(dataset, url), load_manifest(dataset), world)
    shown = "".join(capsys.readouterr()) + "".join(map(str, server.collect()))
    assert "127.0.0.1:9/run" in shown and SECRET not in shown and KEY not in shown
