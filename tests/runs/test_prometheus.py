"""The metrics that a training exports, and the dashboard that shows them."""

import json
import math
import re
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from cnsdiff_dist.distributed.world import World
from tests.support.observing import Watched, samples
from tests.support.runs import metric_lines
from tests.support.small import small_config, write_config
from tests.support.trainers import new_trainer

Capsys = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "launch/grafana/cnsdiff.json"
_BASE_UNITS = {"seconds", "bytes", "ratio"}
_OTHER_UNITS = set("s ms milliseconds minutes hours days kb mb gb gib mib".split())
_OTHER_UNITS |= set("kilobytes megabytes gigabytes percent".split())


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
    ((_, value),) = samples(text)[name]
    return value


def test_values_are_those_of_the_metrics_file(watched: Watched) -> None:
    def value(name: str) -> float:
        return _value(watched.scrape, f"cnsdiff_{name}")

    train = metric_lines(watched.run, "train")
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
        for labels, found in samples(watched.scrape)["cnsdiff_evaluation"]
        if labels["split"] == "valid_iid"
    }
    names = ("step", "epoch", "kind", "time")
    assert scraped in [
        {name: value for name, value in entry.items() if name not in names}
        for entry in metric_lines(watched.run, "valid_iid")
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
    ((labels, _),) = samples(watched.scrape)["cnsdiff_run_info"]
    assert labels == {
        "run": str(watched.run),
        "dataset": "synthetic",
        "negatives": "cnsdiff",
        "world_size": "1",
        "version": "0.1.0",
    }
    assert watched.closed


def test_the_dashboard_shows_all_that_is_exported_and_nothing_else(watched: Watched) -> None:
    board = json.loads(DASHBOARD.read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    shown = set(re.findall(r"\b(?:cnsdiff|process)_\w+", " ".join(t["expr"] for t in targets)))
    exported = set(samples(watched.scrape))
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
    cells = [
        (x, y)
        for p in places
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_a_checkpoint_counts_once_it_is_committed(
    dataset: str, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint whose files are still being written behind the steps does not count."""
    written, go_on, write_json = threading.Event(), threading.Event(), storage.write_json

    def held_up(url: str, tree: Any) -> None:
        if url.endswith("commit.json"):
            written.set()
            assert go_on.wait(60)
        write_json(url, tree)

    monkeypatch.setattr(storage, "write_json", held_up)
    (tmp_path / "run").mkdir()
    trainer = new_trainer(small_config(dataset, tmp_path / "run"), world)
    trainer.checkpoints.save(5, trainer.step.state(), {"progress": {"step": 5}})
    assert written.wait(60)
    assert trainer.checkpoints.newest is None
    go_on.set()
    trainer.checkpoints.wait()
    assert trainer.checkpoints.newest is not None and trainer.checkpoints.newest.step == 5


def test_a_port_that_is_taken_is_refused_before_the_run_is_touched(
    dataset: str, tmp_path: Path, capsys: Capsys
) -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as other:
        port = other.getsockname()[1]
        config = write_config(tmp_path / "small.yaml", dataset, tmp_path / "run")
        capsys.readouterr()
        assert main(["train", config, f"run.metrics_port={port}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"run.metrics_port={port}: " in error
    assert not (tmp_path / "run").exists()
