"""The whole job against a real S3 server: dataset, run and outputs all in a bucket."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from tests.conftest import small_config

pytestmark = pytest.mark.s3
KEY, SECRET = "testkey", "a-secret-that-must-not-be-shown"


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with port + 10000, which the server opens as well."""
    found: list[int] = []
    for port in range(20_000, 40_000, 7):
        try:
            for number in (port, port + 10_000):
                with closing(socket.socket()) as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, s3, admin = _free_ports(5)
    identity = {
        "name": "test",
        "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    weed = str(Path(sys.executable).parent / "weed")
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-s3.port={s3}", f"-admin.port={admin}", f"-s3.config={folder}/s3.json",
        "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    environment = pytest.MonkeyPatch()
    environment.setenv("AWS_ACCESS_KEY_ID", KEY)
    environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    environment.setenv("CNSDIFF_CACHE", str(folder / "cache"))
    try:
        _create_bucket("train-bucket", folder / "log")
        yield "s3://train-bucket"
    finally:
        environment.undo()
        os.killpg(server.pid, signal.SIGKILL)  # on SIGTERM it lingers for half a minute
        server.wait()


def _create_bucket(name: str, log: Path) -> None:
    import s3fs

    deadline = time.monotonic() + 60
    while True:
        try:
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(name)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise RuntimeError(log.read_text()[-2000:]) from None
            time.sleep(0.2)


def test_the_whole_job_in_a_bucket(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = f"{bucket}/data", f"{bucket}/runs/first"
    assert main(["prepare", data, "--synthetic", "--users", "300", "--items", "150"]) == 0
    config = tmp_path / "s3.yaml"
    tree = small_config(data, run, checkpoint={"every_steps": 2}).model_dump(mode="json")
    config.write_text(yaml.safe_dump(tree))
    assert main(["train", str(config), "train.epochs=1"]) == 0
    capsys.readouterr()
    assert main(["train", str(config)]) == 0
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
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    assert main(["evaluate", f"{bucket}/runs/first"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "s3://train-bucket/runs/first" in error
    assert "another-secret" not in error and SECRET not in error
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_endpoint_that_does_not_answer_is_named_in_seconds(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    started = time.monotonic()
    assert main(["evaluate", f"{bucket}/runs/first"]) == 2
    assert "the host does not answer" in capsys.readouterr().err
    assert time.monotonic() - started < 60
    s3fs.S3FileSystem.clear_instance_cache()
