"""Secrets in URLs: neither shown nor saved."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cnsdiff_dist import storage
from cnsdiff_dist.cli import main
from tests.support.hostile import Victim

SECRET_URLS = [
    "s3://joe:hunter2@bucket/x",
    "http://joe:hunter2@127.0.0.1:9/x",
    "s3://bucket/x?token=hunter2",
    "http://127.0.0.1:9/x?sig=hunter2#hunter2",
    "S3://joe:hunter2@bucket/x",
    "zip://a::s3://joe:hunter2@bucket/x.zip",
    "simplecache::http://joe:hunter2@127.0.0.1:9/x",
    "simplecache::http://127.0.0.1:9/x?token=hunter2",
    "ftp://joe:hunter2@127.0.0.1/x",
]


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch, new_clients: Callable[[], None]) -> None:
    monkeypatch.setattr(storage.patience, "seconds", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    new_clients()


def _secret_free(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert "hunter2" not in str(path)
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("url", SECRET_URLS)
def test_secrets_in_urls_are_neither_shown_nor_saved(
    url: str,
    dataset: str,
    attacked: Victim,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attacked.restore()
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "empty.yaml"
    config.write_text("")
    capfd.readouterr()
    for words in (
        ["train", str(config), f"data.url={url}", f"run.dir={tmp_path}/r"],
        ["train", str(config), f"data.url={dataset}", f"run.dir={url}"],
        ["plan", str(config), f"data.url={url}"],
        ["calibrate", str(attacked.folder), "--exposure", url],
        ["evaluate", url],
        ["export", url, str(tmp_path / "e")],
        ["recommend", str(attacked.folder), url, "--k", "2"],
        ["report", url],
        ["evaluate", str(attacked.folder), "--data", url],
        ["prepare", str(tmp_path / "d"), "--log", url, "--shift", "random"],
    ):
        try:
            code = main(words)
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        assert code in (2, 75), words
        said = capfd.readouterr()
        assert "hunter2" not in said.out + said.err, words
        _secret_free(attacked.folder)
        _secret_free(tmp_path)
