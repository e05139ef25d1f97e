"""Storage: URLs, atomic writes, listings, caching; the errors a user sees."""

import errno
import os
import stat
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnsdiff_dist import storage
from cnsdiff_dist.errors import TryAgain, UserError


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "root")
    fsspec.filesystem("memory").store.clear()
    return "memory://root"


def test_written_bytes_are_read_back(root: str) -> None:
    storage.write_text(f"{root}/deep/er/text", "Ünïcode")
    storage.write_bytes(f"{root}/deep/bytes", b"\x00\xff")
    assert storage.read_text(f"{root}/deep/er/text") == "Ünïcode"
    assert storage.list_files(root) == ["deep/bytes", "deep/er/text"]
    assert storage.exists(f"{root}/deep")
    with storage.open_read(f"{root}/deep/bytes") as file:
        assert file.read() == b"\x00\xff"
    with pytest.raises(UserError, match="deep/bytes: not UTF-8 text at byte 1"):
        storage.read_text(f"{root}/deep/bytes")


def test_a_failed_write_leaves_the_old_file(root: str) -> None:
    storage.write_text(f"{root}/file", "old")

    def fail() -> None:
        with storage.open_write(f"{root}/file") as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_text(f"{root}/file") == "old"
    assert storage.list_files(root) == ["file"]


def test_deleting(root: str) -> None:
    storage.write_text(f"{root}/a/b", "x")
    storage.delete_tree(f"{root}/a/b")
    storage.delete_tree(f"{root}/a/b")
    storage.write_text(f"{root}/a/c", "x")
    storage.delete_tree(f"{root}/a")
    assert not storage.exists(f"{root}/a")
    assert storage.list_files(f"{root}/a") == []


def test_glob(root: str) -> None:
    for name in ("b.csv", "a.csv", "a.txt"):
        storage.write_text(f"{root}/{name}", "x")
    assert storage.glob(f"{root}/nothing.csv") == [f"{root}/nothing.csv"]
    found = storage.glob(f"{root}/*.csv")
    assert [name.rpartition("/")[2] for name in found] == ["a.csv", "b.csv"]
    assert all(storage.read_text(name) == "x" for name in found)
    with pytest.raises(UserError, match="no file matches"):
        storage.glob(f"{root}/*.parquet")


def test_uploads(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    Path(root).mkdir(exist_ok=True) if storage.is_local(root) else None
    storage.upload(source, f"{root}/file")
    assert storage.read_bytes(f"{root}/file") == b"one"


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:hunter2@bucket/x",
        "s3://key:hun/ter2@bucket/x",
        "simplecache::s3://key:hunter2@bucket/x",
        "http://host/x?token=hunter2",
    ],
)
def test_urls_with_secrets_are_refused(url: str) -> None:
    with pytest.raises(UserError) as caught:
        storage.refuse_secrets(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["abfs://box@account.dfs.host/x", "http://h:9000/a@b", "/a?b@c:d"])
def test_urls_without_secrets_are_accepted_and_shown_whole(url: str) -> None:
    storage.refuse_secrets(url)
    assert storage.display(url) == url


def test_a_new_file_has_the_usual_rights(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "file"), "x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/a/b?token=1#x", "s3://bucket/a/b"),
        ("https://host/a?sig=1", "https://host/a"),
        ("/a/b c", "/a/b c"),
        ("file:///a/b", "/a/b"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert storage.display(url) == shown


@given(st.text(min_size=1, max_size=12))
def test_join_stays_inside(relative: str) -> None:
    try:
        joined = storage.join("s3://bucket/dir", relative)
    except UserError:
        return
    assert joined.startswith("s3://bucket/dir/")
    assert ".." not in joined.split("/")


@pytest.mark.parametrize("relative", ["", "/etc", "../up", "a/../../b", "s3://other/x"])
def test_join_refuses_to_climb(relative: str) -> None:
    with pytest.raises(UserError, match="is not a path inside this directory"):
        storage.join("/dir", relative)


class EndpointConnectionError(Exception):
    __module__ = "botocore.exceptions"


class NoCredentialsError(Exception):
    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError("x"), "no such file or directory"),
        (OSError(errno.ENOSPC, "full"), "no space left"),
        (OSError(errno.EROFS, "ro"), "read-only file system"),
        (PermissionError("x"), "permission denied"),
        (FileExistsError(errno.EEXIST, "there"), "a file is in the way"),
        (EndpointConnectionError("x"), "the host does not answer"),
        (NoCredentialsError("x"), "AWS_ACCESS_KEY_ID"),
        (OSError("bad joe:hunter2@host and s3://k:hunter2@b\nmore"), "bad host and s3://b more"),
    ],
)
def test_failures_in_one_line(error: Exception, expected: str) -> None:
    url = "s3://joe:hunter2@bucket/x"
    with pytest.raises(UserError) as caught, storage.explained(url, "read"):
        raise error
    message = str(caught.value)
    assert message.startswith("s3://bucket/x: cannot read: ")
    assert expected in message
    assert "hunter2" not in message
    assert "\n" not in message


def test_a_bug_is_not_explained_away() -> None:
    with pytest.raises(KeyError), storage.explained("/x", "read"):
        raise KeyError("bug")


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make `exists` of memory:// fail always; the pauses that are asked for but not slept."""
    pauses: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    def fail(*_: object, **__: object) -> bool:
        raise ConnectionError("try again")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "exists", fail)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return pauses


def test_a_failure_that_may_pass_is_tried_again_until_patience_ends(
    flaky: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.patience, "seconds", 300.0)
    with pytest.raises(TryAgain, match="the host does not answer"):
        storage.exists("memory://flaky/file")
    assert 270 < sum(flaky) <= 300
    assert max(flaky) <= 10 and flaky[0] <= 0.2
    assert len(set(flaky)) == len(flaky)  # at random, or ranks would come back together


def test_a_failure_that_passes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_text("memory://flaky/file", "x")
    memory = fsspec.filesystem("memory")
    real, calls = type(memory).exists, []

    def fail_twice(self: object, path: str, **words: object) -> bool:
        calls.append(path)
        if len(calls) < 3:
            raise OSError(errno.EREMOTEIO, "internal error")  # a 500 of S3, as s3fs tells it
        return bool(real(memory, path))

    monkeypatch.setattr(type(memory), "exists", fail_twice)
    before = storage.patience.retries
    assert storage.exists("memory://flaky/file")
    assert len(calls) == 3 and storage.patience.retries == before + 2


def test_what_will_not_pass_is_not_tried_again(flaky: list[float]) -> None:
    with pytest.raises(PermissionError):
        storage.retrying(lambda: (_ for _ in ()).throw(PermissionError("no")))
    assert flaky == []
