"""What `cnsdiff prepare` leaves: whole datasets or nothing, and nobody else's files harmed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnsdiff_dist.data.dataset import load_manifest, read_split
from cnsdiff_dist.errors import UserError
from tests.support.preparing import NOTHING_CUT, all_files, prepare, write_parquet


def test_an_existing_dataset_is_replaced_only_on_demand(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = prepare(out, "--log", log, "--shift", "temporal")
    before = all_files(out)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        prepare(out, "--log", log, "--shift", "random")
    bad = tmp_path / "bad.csv"
    bad.write_text("user,item\n1,1\n1,1\n")
    with pytest.raises(UserError, match="again"):
        prepare(out, "--train", bad, "--overwrite")
    assert all_files(out) == before
    (out / "notes.txt").write_text("mine")
    small = prepare(out, "--train", log, *NOTHING_CUT, "--overwrite")
    assert small.digest != old.digest
    folders = {path.name for path in out.iterdir()}
    assert folders == {"manifest.json", "train", "ids", "graph", "notes.txt"}


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_a_directory_with_other_things_is_refused(
    log: Path, tmp_path: Path, words: list[str]
) -> None:
    with pytest.raises(UserError, match="not empty"):
        prepare(tmp_path, "--log", log, "--shift", "random", *words)
    assert log.exists()


def test_overwriting_never_deletes_what_is_not_of_the_dataset(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out, "--log", log, "--shift", "random")
    (out / "train/raw.csv").write_text("mine")
    with pytest.raises(UserError, match=r"train/raw.csv: not of the dataset"):
        prepare(out, "--log", log, "--shift", "random", "--overwrite")
    assert (out / "train/raw.csv").read_text() == "mine"


@pytest.mark.parametrize("stage", ["read", "dropped", "cut test_iid", "writing", "publish"])
def test_interrupted_anywhere_nothing_is_left(
    stage: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(line: str, **_: object) -> None:
        if line.startswith(stage):
            raise KeyboardInterrupt

    monkeypatch.setattr("cnsdiff_dist.commands.prepare.print", interrupt, raising=False)
    if stage == "publish":
        calls = []

        def replace(source: Path, target: Path) -> None:
            calls.append(target)
            if len(calls) == 3:
                raise KeyboardInterrupt
            os.rename(source, target)

        monkeypatch.setattr("cnsdiff_dist.prepare.publishing.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", "--log", log, "--shift", "random")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_clean_up(number: int, tmp_path: Path) -> None:
    rows = np.arange(600_000)
    log = write_parquet(tmp_path / "log.parquet", user=rows // 8, item=rows * 7919 % 50_021)
    words = ["prepare", str(tmp_path / "out"), "--log", str(log), "--shift", "popularity"]
    command = [sys.executable, "-m", "cnsdiff_dist", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("read ")  # in the middle of its work
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """A file system with little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_disk: Path, tmp_path: Path) -> None:
    rows = 200_000
    log = write_parquet(tmp_path / "l.parquet", user=np.arange(rows), item=np.arange(rows))
    with pytest.raises(UserError, match="no space left") as caught:
        prepare(tiny_disk / "out", "--log", log, "--shift", "random")
    assert "\n" not in str(caught.value)
    assert not list(tiny_disk.iterdir())


def test_a_read_only_disk_is_one_line(tiny_disk: Path, log: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(UserError, match="read-only file system; write elsewhere"):
        prepare(tiny_disk / "out", "--log", log, "--shift", "random")


def test_a_manifest_is_needed_to_open_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest.json here; make a dataset with"):
        load_manifest(str(tmp_path))


def test_an_absent_split_names_those_that_are_there(log: Path, tmp_path: Path) -> None:
    manifest = prepare(tmp_path / "out", "--train", log, *NOTHING_CUT)
    with pytest.raises(UserError, match="split test_ood is not in this dataset; it has train"):
        read_split(str(tmp_path / "out"), manifest, "test_ood")


def test_debris_of_a_killed_run_does_not_block_the_next(log: Path, tmp_path: Path) -> None:
    debris = tmp_path / "out/.staging-killed"
    debris.mkdir(parents=True)
    (debris / "half").write_bytes(b"written")
    prepare(tmp_path / "out", "--log", log, "--shift", "random")
    assert not debris.exists()
