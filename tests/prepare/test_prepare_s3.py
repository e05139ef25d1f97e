"""`cnsdiff prepare` from and to an S3 bucket, against a real server."""

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_split
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.errors import UserError
from tests.support.preparing import prepare, skewed_log

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("bucket")]
BUCKET = "s3://train-bucket"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.parquet"
    pq.write_table(skewed_log(), path)
    return path


def test_a_dataset_in_a_bucket_is_the_same(log: Path, tmp_path: Path) -> None:
    url = f"{BUCKET}/made"
    storage.upload(log, f"{BUCKET}/logs/part-0.parquet")
    words = ["--shift", "popularity", "--name", "same"]
    local = prepare(tmp_path / "out", "--log", log, *words)
    remote = prepare(url, "--log", f"{BUCKET}/logs/*.parquet", *words)
    assert remote == local
    ours, theirs = (open_graph(place, local) for place in (str(tmp_path / "out"), url))
    assert (ours.user_items == theirs.user_items).all()
    users, _ = read_split(url, remote, "test_ood")
    assert len(users) == remote.splits["test_ood"].rows
    with pytest.raises(UserError, match=f"{url}: a dataset is here"):
        prepare(url, "--log", log, *words)
    again = prepare(url, "--train", log, "--valid-ood-fraction", 0, "--overwrite")
    folders = {name.split("/")[0] for name in storage.list_files(url)}
    assert folders == {"manifest.json", "train", "valid_iid", "ids", "graph"}
    assert sum(split.rows for split in again.splits.values()) == skewed_log().num_rows


def test_a_failed_upload_leaves_no_dataset(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload, calls = storage.upload, []

    def failing(source: Path, url: str) -> None:
        calls.append(url)
        if len(calls) == 5:
            raise UserError("the network is gone")
        upload(source, url)

    monkeypatch.setattr(storage, "upload", failing)
    with pytest.raises(UserError, match="the network is gone"):
        prepare(f"{BUCKET}/failed", "--log", log, "--shift", "random")
    assert storage.list_files(f"{BUCKET}/failed") == []


def test_mistakes_are_one_line_within_seconds(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_clients: Callable[[], None]
) -> None:
    start = time.monotonic()
    random = ["--shift", "random"]
    with pytest.raises(UserError, match=f"{BUCKET}/none.csv: cannot read: no such file"):
        prepare(tmp_path / "out", "--log", f"{BUCKET}/none.csv", *random)
    with pytest.raises(UserError, match=r"s3://nobucket/out.*: cannot "):
        prepare("s3://nobucket/out", "--log", log, *random)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    new_clients()
    with pytest.raises(UserError, match=f"{BUCKET}/x.csv: cannot read: permission denied"):
        prepare(tmp_path / "out", "--log", f"{BUCKET}/x.csv", *random)
    assert time.monotonic() - start < 200  # far less than a training waits
