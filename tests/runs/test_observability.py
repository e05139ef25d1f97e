"""What can be seen of a training from outside: Prometheus metrics, log lines, `cnsdiff status`."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cnsdiff_dist import logs, storage
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import _exporter
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.runs.directory import open_run
from cnsdiff_dist.runs.reporter import Screen
from cnsdiff_dist.runs.status import read_status
from tests.support.ports import free_port
from tests.support.s3server import KEY, SECRET
from tests.support.small import small_config
from tests.training.test_survival import _committed, _long, _rank, _started, _torchrun, _wait
from tests.training.test_train import _trainer

Capsys = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "launch/grafana/cnsdiff.json"


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def _samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Sample name -> its labels and values."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _lines(run: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def _status(run: Path | str, capsys: Capsys) -> tuple[str, dict[str, Any]]:
    """What is printed for people, and as JSON."""
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert main(["status", str(run), "--json"]) == 0
    return text, json.loads(capsys.readouterr().out)


# --- Prometheus -----------------------------------------------------------------------------


@dataclass
class Watched:
    """A training while it ran and after it was preempted."""

    run: Path
    scrape: str
    running: dict[str, Any]
    preempted: dict[str, Any]
    closed: bool


@pytest.fixture(scope="module")
def watched(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    port = free_port()
    run, words = _long(
        dataset, tmp_path_factory.mktemp("watched"),
        checkpoint={"every_steps": 7, "keep": 100_000},
    )  # fmt: skip
    with _started(*words, f"run.metrics_port={port}") as process:
        _wait(lambda: len(_committed(run)) > 3)
        scrape = _wait(lambda: "last_checkpoint" in (text := _scrape(port)) and text)
        running = read_status(str(run))
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    with closing(socket.socket()) as probe:
        closed = probe.connect_ex(("127.0.0.1", port)) != 0
    return Watched(run, scrape, running, read_status(str(run)), closed)


_BASE_UNITS = {"seconds", "bytes", "ratio"}
_OTHER_UNITS = {
    "s", "ms", "milliseconds", "minutes", "hours", "days", "kb", "mb", "gb", "gib", "mib",
    "kilobytes", "megabytes", "gigabytes", "percent",
}  # fmt: skip


def test_names_and_units_are_those_of_prometheus(watched: Watched) -> None:
    families = list(text_string_to_metric_families(watched.scrape))
    ours = [family for family in families if family.name.startswith("cnsdiff_")]
    assert len(ours) > 15
    for family in ours:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name) and family.documentation, family.name
        words = family.name.split("_")
        assert not _OTHER_UNITS & set(words), family.name
        units = [word for word in words if word in _BASE_UNITS]
        assert not units or words[-1] in units, family.name  # the unit comes last
        assert not {"gauge", "counter", "total", "count", "sum", "bucket"} & set(words)
        for sample in family.samples:
            suffix = {"counter": "_total", "gauge": ""}.get(family.type)
            assert suffix is not None and sample.name == family.name + suffix, sample.name
            assert math.isfinite(sample.value)
            assert sample.labels["run"] == str(watched.run)
    assert {"process_resident_memory_bytes", "process_start_time_seconds"} <= {
        family.name for family in families
    }


def _value(text: str, name: str) -> float:
    ((_, value),) = _samples(text)[name]
    return value


def test_values_are_those_of_the_metrics_file(watched: Watched) -> None:
    def value(name: str) -> float:
        return _value(watched.scrape, f"cnsdiff_{name}")

    train = _lines(watched.run, "train")
    (last,) = (at for at, line in enumerate(train) if line["loss"] == value("loss"))
    line = train[last]
    assert value("samples_per_second") == line["samples_per_second"]
    assert value("goodput_ratio") == line["goodput"] and 0 < line["goodput"] <= 1
    assert value("peak_memory_bytes") == line["memory_gib"] * 2**30
    assert value("epoch") == line["epoch"]
    assert value("last_log_timestamp_seconds") == pytest.approx(line["time"], abs=1)
    assert value("planned_steps") == line["total_steps"]
    assert value("step") in (line["step"], line["step"] + 1) and line["step"] > 20
    assert value("steps_total") == value("step")  # of a process that began at 0
    for name in ("data_wait_seconds", "checkpoint_wait_seconds"):
        waited = sum(line.get(name, 0.0) for line in train[: last + 1])
        assert waited > 0 and value(f"{name}_total") == pytest.approx(waited)
    assert value("read_retries_total") == value("skipped_steps_total") == 0
    scraped = {
        labels["metric"]: found
        for labels, found in _samples(watched.scrape)["cnsdiff_evaluation"]
        if labels["split"] == "valid_iid"
    }
    names = ("step", "epoch", "kind", "time")
    assert scraped in [
        {name: value for name, value in entry.items() if name not in names}
        for entry in _lines(watched.run, "valid_iid")
    ]


def test_the_checkpoint_is_the_newest_committed_one(watched: Watched) -> None:
    def value(name: str) -> float:
        return _value(watched.scrape, f"cnsdiff_last_checkpoint_{name}")

    folder = watched.run / f"checkpoints/step-{value('step'):08.0f}"
    commit = json.loads((folder / "commit.json").read_text())
    assert value("timestamp_seconds") == commit["time"]
    assert commit["time"] == pytest.approx((folder / "commit.json").stat().st_mtime, abs=2)
    assert value("write_seconds") == commit["write_seconds"] > 0
    files = [path for path in folder.iterdir() if path.name != "commit.json"]
    assert value("size_bytes") == sum(path.stat().st_size for path in files)


def test_what_is_trained_is_named_and_the_port_is_given_back(watched: Watched) -> None:
    ((labels, _),) = _samples(watched.scrape)["cnsdiff_run_info"]
    assert labels == {
        "run": str(watched.run), "dataset": "synthetic", "negatives": "cnsdiff",
        "world_size": "1", "version": "0.1.0",
    }  # fmt: skip
    assert watched.closed


def test_the_dashboard_shows_all_that_is_exported_and_nothing_else(watched: Watched) -> None:
    board = json.loads(DASHBOARD.read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"\b(?:cnsdiff|process)_\w+", " ".join(t["expr"] for t in targets)))
    exported = set(_samples(watched.scrape))
    assert shown <= exported
    assert {name for name in exported if name.startswith("cnsdiff_")} <= shown
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["definition"] == "label_values(cnsdiff_run_info, run)"
    for panel in board["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"] and panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in targets:
        ours = re.findall(r"\bcnsdiff_\w+(\S*)", target["expr"])
        assert all(rest.startswith('{run="$run"') for rest in ours), target["expr"]
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"])
             for y in range(p["y"], p["y"] + p["h"])]  # fmt: skip
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_a_checkpoint_counts_once_it_is_committed(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while its files are written behind the steps."""
    written, go_on, write_json = threading.Event(), threading.Event(), storage.write_json

    def held_up(url: str, tree: Any) -> None:
        if url.endswith("commit.json"):
            written.set()
            assert go_on.wait(60)
        write_json(url, tree)

    monkeypatch.setattr(storage, "write_json", held_up)
    (tmp_path / "run").mkdir()
    trainer = _trainer(small_config(dataset, tmp_path / "run"), world)
    trainer.checkpoints.save(5, trainer.state(), {"progress": {"step": 5}})
    assert written.wait(60)
    assert trainer.checkpoints.newest is None
    go_on.set()
    trainer.checkpoints.wait()
    assert trainer.checkpoints.newest is not None and trainer.checkpoints.newest.step == 5


def _config(folder: Path, dataset: str, run: Path | str, **sections: dict[str, Any]) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(small_config(dataset, run, **sections).model_dump(mode="json")))
    return str(path)


def test_a_port_that_is_taken_is_refused_before_the_run_is_touched(
    dataset: str, tmp_path: Path, capsys: Capsys
) -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as other:
        port = other.getsockname()[1]
        config = _config(tmp_path, dataset, tmp_path / "run")
        capsys.readouterr()
        assert main(["train", config, f"run.metrics_port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"run.metrics_port={port}: " in error
    assert not (tmp_path / "run").exists()


# --- log lines ------------------------------------------------------------------------------

_FIELDS = ["time", "level", "rank", "run", "step", "restart", "message"]


def _records(text: str) -> list[dict[str, Any]]:
    """Every line parsed, and its fields looked at."""
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
        logs.VARIABLE: "json", "FORCE_COLOR": "1", "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    run, words = _long(dataset, tmp_path, checkpoint={"every_steps": 5})
    out, port = tmp_path / "out", free_port()
    words.append(f"run.metrics_port={port}")
    options = ["--max-restarts", "1", "--monitor-interval", "0.1", "--log-dir", str(out)]
    with _started(*_torchrun(*options, "--redirects", "3", *words)) as process:
        _wait(lambda: _committed(run))
        _rank(process, 1).kill()
        printed = "*/attempt_1/0/stdout.log"
        _wait(lambda: any("valid_iid" in path.read_text() for path in out.glob(printed)))
        scraped = _samples(_scrape(port))  # rank 0 has it again, and rank 1 does not ask for it
        _rank(process, 1).send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
    assert scraped["cnsdiff_run_info"][0][0]["world_size"] == "2"
    assert scraped["cnsdiff_last_checkpoint_step"][0][1] >= 5
    texts = [path.read_text() for path in out.rglob("std*.log")]
    records = [record for text in texts for record in _records(text)]
    assert len(texts) == 8 and not any(SECRET in text or KEY in text for text in texts)
    assert all(record["run"] == str(run) for record in records)
    assert {(r["rank"], r["restart"]) for r in records} == {(0, 0), (0, 1), (1, 1)}
    metrics = [r for r in records if r.get("kind") == "train" and r["restart"] == 1]
    logged = {line["step"]: line for line in _lines(run, "train")}
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
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, logs.VARIABLE: "json", "RANK": "3"},
    )  # fmt: skip
    assert done.returncode == 1
    (odd,), (record, bug) = _records(done.stdout), _records(done.stderr)
    assert odd["loss"] is None and odd["rank"] == 3
    assert (record["level"], record["logger"]) == ("warning", "botocore")
    assert record["message"] == "two\nlines 1"
    assert bug["level"] == "critical" and bug["message"] == "RuntimeError: a bug"
    assert bug["traceback"].startswith("Traceback (most recent call last)")


def test_leaving_at_once_is_a_line_too() -> None:
    code = "from tests.training.test_survival import _hang; _hang(1, asked=True)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        cwd=ROOT, env={**os.environ, logs.VARIABLE: "json"},
    )  # fmt: skip
    (record,) = _records(done.stderr)
    assert done.returncode == 75 and "run.grace_seconds (1 s) are over" in record["message"]


def test_text_is_the_default_and_the_number_fields_are_not_in_it(capsys: Capsys) -> None:
    Screen().say("epoch 0  [1]  step 5/24", "warning", {"loss": 4.9})
    assert capsys.readouterr().out == "epoch 0  [1]  step 5/24\n"


def test_another_log_format_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    assert main(["train", "configs/demo.yaml"]) == 2
    assert capsys.readouterr().err == "cnsdiff: error: CNSDIFF_LOG_FORMAT=xml: text or json\n"


# --- secrets --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_password_in_a_url_is_in_no_output(
    form: str, dataset: str, tmp_path: Path, world: World, capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(logs.VARIABLE, form)
    url = f"http://{KEY}:{SECRET}@127.0.0.1:9/run"
    config = _config(tmp_path, dataset, tmp_path / "run")
    assert main(["train", config, f"run.dir={url}"]) == 2
    assert main(["status", url]) == 2
    exporter = _exporter(small_config(dataset, url), load_manifest(dataset), world)
    shown = "".join(capsys.readouterr()) + "".join(map(str, exporter.collect()))
    assert "127.0.0.1:9/run" in shown and SECRET not in shown and KEY not in shown


# --- status ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", _config(folder, dataset, folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_status_of_a_run_before_its_first_step(
    dataset: str, tmp_path: Path, world: World, capsys: Capsys
) -> None:
    open_run(small_config(dataset, tmp_path / "run"), load_manifest(dataset), world)
    text, status = _status(tmp_path / "run", capsys)
    assert status["step"] == 0 and status["finished"] is None and not status["checkpoints"]
    assert "no step logged yet" in text and "none committed yet" in text
    assert re.search(r"^ranks +1 on cpu$", text, re.M)


def test_status_of_a_run_that_trains(watched: Watched) -> None:
    status = watched.running
    assert 0 < status["step"] <= watched.preempted["step"] < status["total_steps"] == 36_000
    assert status["finished"] is None and status["last_sign_of_life"]["seconds_ago"] < 60
    (line,) = (x for x in _lines(watched.run, "train") if x["loss"] == status["loss"])
    assert line["goodput"] == status["goodput"] and line["memory_gib"] == status["memory_gib"]
    assert status["remaining_seconds"] > 0 and 0 <= status["data_wait_ratio"] <= 1
    committed = [entry["step"] for entry in status["checkpoints"]]
    assert len(committed) > 3 and set(committed) <= set(_committed(watched.run))


def test_status_of_a_preempted_run(watched: Watched, capsys: Capsys) -> None:
    text, status = _status(watched.run, capsys)
    newest = _committed(watched.run)[-1]
    assert status["step"] == status["checkpoints"][-1]["step"] == newest
    assert re.search(rf"^progress +step {newest:,} of 36,000 \(\d+ %\), epoch \d+$", text, re.M)
    assert re.search(r"^state +not finished; last sign of life \d+ .*ago \(", text, re.M)
    assert re.search(r"^remaining +\d+ .* at this pace$", text, re.M)
    assert "retries" not in text and "skipped" not in text and "as of" not in text


def test_status_of_a_finished_run(finished: Path, capsys: Capsys) -> None:
    text, status = _status(finished, capsys)
    (best,) = (entry for entry in status["checkpoints"] if entry["best"])
    lines = {line["step"]: line["recall@20"] for line in _lines(finished, "valid_iid")}
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
    config = _config(tmp_path, dataset, tmp_path / "run", train=train, tables=tables)
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
        [sys.executable, "-c", code, "status", str(finished)], capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_status_on_a_terminal_is_rich(
    finished: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["status", str(finished)]) == 0
    assert "\x1b[1mprogress" in capsys.readouterr().out


def test_status_names_damaged_checkpoints(copied: Path, world: World, capsys: Capsys) -> None:
    older, newest = _committed(copied)
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
    '{"step": 9', "[]", "7", '{"kind": 1, "step": 2, "time": 3}', '{"kind": "train"}',
    '{"kind": "train", "step": "a", "time": 1}', '{"kind": "train", "step": 1e400, "time": 1}',
    '{"kind": "train", "step": 25, "time": 1e300}', '{"kind": "train", "step": 25, "time": NaN}',
    '{"kind": "train", "step": 25, "time": 1, "loss": "x", "total_steps": [], "epoch": "\\u001b["}',
    '{"kind": "valid_iid", "step": 25, "time": 1, "recall@20": null}', "[" * 5000,
]  # fmt: skip


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
    bucket: str, finished: Path, new_clients: Callable[[], None], capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = f"{bucket}/runs/observed"
    for path in sorted(finished.rglob("*")):
        if path.is_file():
            storage.upload(path, f"{run}/{path.relative_to(finished)}")
    text, status = _status(run, capsys)
    here = read_status(str(finished))
    assert re.search(r"^as of +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; evaluations and", text, re.M)
    changing = {"run": run, "as_of": _lines(finished, "valid_iid")[-1]["time"]}
    for found in (here, status):
        found["last_sign_of_life"].pop("seconds_ago")
    assert status == {**here, **changing}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    new_clients()
    assert main(["status", run]) == 75
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the host does not answer" in error and SECRET not in error
