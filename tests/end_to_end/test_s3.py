"""The whole job against a real S3 server: dataset, run and outputs all in a bucket."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from tests.support.s3server import KEY, SECRET
from tests.support.small import write_config

pytestmark = pytest.mark.s3


def test_the_whole_job_in_a_bucket(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = f"{bucket}/data", f"{bucket}/runs/first"
    assert main(["prepare", data, "--synthetic", "--users", "300", "--items", "150"]) == 0
    config = write_config(tmp_path / "s3.yaml", data, run, checkpoint={"every_steps": 2})
    assert main(["train", config, "train.epochs=1"]) == 0
    capsys.readouterr()
    assert main(["train", config]) == 0
    assert f"resumed from {run}/checkpoints/step-" in capsys.readouterr().out
    assert main(["evaluate", run, "--split", "test_ood"]) == 0
    assert main(["export", run, f"{bucket}/out/embeddings"]) == 0
    assert main(["recommend", run, f"{bucket}/out/top", "--k", "5"]) == 0

    files = storage.list_files(run)
    assert {"config.yaml", "metrics.jsonl", "evaluations/test_ood.json"} <= set(files)
    assert any("tfevents" in name for name in files)
    lines = [json.loads(line) for line in storage.read_text(f"{run}/metrics.jsonl").splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "valid_iid"]
    assert steps == sorted(set(steps)) and len(steps) == 2
    with storage.open_read(f"{bucket}/out/top/part-00000.parquet") as file:
        assert pq.read_table(file).num_rows % 5 == 0

    for name in storage.list_files(bucket):
        content = storage.read_bytes(f"{bucket}/{name}")
        assert SECRET.encode() not in content and KEY.encode() not in content, name


def test_wrong_keys_are_refused_without_showing_them(
    bucket: str,
    new_clients: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    new_clients()
    assert main(["evaluate", f"{bucket}/runs/first"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "s3://train-bucket/runs/first" in error
    assert "another-secret" not in error and SECRET not in error


def test_an_endpoint_that_does_not_answer_is_named_in_seconds(
    bucket: str,
    new_clients: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    new_clients()
    started = time.monotonic()
    assert main(["evaluate", f"{bucket}/runs/first"]) == 75  # it may answer later
    assert "the host does not answer" in capsys.readouterr().err
    assert time.monotonic() - started < 200  # far less than a training waits
