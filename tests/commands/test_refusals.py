"""Mistakes of a user are refused in one line with exit code 2, and leave no half-written file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cnsdiff_dist.cli import main
from tests.support.ranks import files_under
from tests.support.small import write_config

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def config(dataset: str, tmp_path: Path) -> str:
    return write_config(tmp_path / "small.yaml", dataset, tmp_path / "run", train={"epochs": 1})


def refusal(capsys: Capsys, *words: object) -> str:
    """Run a command that exits with 2; the line on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnsdiff: error: ")
    assert error.count("\n") == 1 and error.endswith("\n")
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=2", "unknown key train.epoch; did you mean train.epochs?"),
        ("train.epochs=many", "train.epochs"),
        ("data.url=", "data.url"),
        ("data.url=/nowhere/at/all", "/nowhere/at/all: no manifest.json here"),
        ("train.select_split=valid_ood", None),
        ("run.dir=/proc/nowhere/run", "/proc/nowhere/run"),
        ("data.url=nope://bucket/x", "unknown protocol 'nope'"),
        ("run.dir={dataset}", "not empty (graph/item_indptr-00000.bin) and not a run"),
    ],
)
def test_wrong_config(
    config: str, dataset: str, capsys: Capsys, override: str, message: str | None
) -> None:
    override = override.format(dataset=dataset)
    if message is None:
        assert main(["train", config, override]) == 0
    else:
        assert message in refusal(capsys, "train", config, override)


def test_missing_config(capsys: Capsys) -> None:
    assert "no such config file" in refusal(capsys, "train", "nowhere.yaml")
    assert "name a config file" in refusal(capsys, "train")


def test_run_directory_of_another_dataset(
    config: str, other_dataset: str, tmp_path: Path, capsys: Capsys
) -> None:
    assert main(["train", config]) == 0
    before = files_under(tmp_path / "run")
    line = refusal(capsys, "train", config, f"data.url={other_dataset}")
    assert "trained on another dataset" in line and "run.dir" in line
    assert "model.dim=16" in refusal(capsys, "train", config, "model.dim=32")
    assert "another dataset" in refusal(
        capsys, "evaluate", tmp_path / "run", "--data", other_dataset
    )
    assert "test_later is not in this dataset" in refusal(
        capsys, "evaluate", tmp_path / "run", "--split", "test_later"
    )
    assert "at least 1" in refusal(
        capsys, "recommend", tmp_path / "run", tmp_path / "r", "--k", "0"
    )
    assert "cannot read" in refusal(
        capsys, "recommend", tmp_path / "run", tmp_path / "r", "--users", ""
    )
    (tmp_path / "users.txt").write_text("0\nnobody\n")
    line = refusal(
        capsys, "recommend", tmp_path / "run", tmp_path / "r", "--users", tmp_path / "users.txt"
    )
    assert "users.txt line 2: 'nobody'" in line and "prepare --hashed-users" in line
    assert not (tmp_path / "r").exists()
    assert files_under(tmp_path / "run") == before


def test_an_output_replaces_only_an_output(config: str, tmp_path: Path, capsys: Capsys) -> None:
    assert main(["train", config]) == 0
    dataset = yaml.safe_load(Path(config).read_text())["data"]["url"]
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    before = files_under(copy)
    for command, folder in (("recommend", "train"), ("export", "ids"), ("export", "")):
        line = refusal(capsys, command, tmp_path / "run", copy / folder)
        assert "holds other files" in line and "choose an empty directory" in line
    assert files_under(copy) == before
    (tmp_path / "foreign").mkdir()
    for name in ("part-00000.parquet", "_SUCCESS"):
        (tmp_path / "foreign" / name).write_bytes(b"of another tool")
    assert "other files" in refusal(capsys, "recommend", tmp_path / "run", tmp_path / "foreign")


@pytest.mark.parametrize(
    "left",
    [
        ["part-00007.parquet", ".part-00000.parquet.y8r8vxb0", "_INCOMPLETE"],
        ["._INCOMPLETE.oz2abtts"],
        ["part-00000.parquet", "._SUCCESS.avgr2d83", "_INCOMPLETE"],
    ],
)
def test_what_a_killed_one_left_is_replaced(left: list[str], config: str, tmp_path: Path) -> None:
    assert main(["train", config]) == 0
    (tmp_path / "killed").mkdir()
    for name in left:
        (tmp_path / "killed" / name).write_bytes(b"what a killed one left")
    assert main(["recommend", str(tmp_path / "run"), str(tmp_path / "killed")]) == 0
    assert files_under(tmp_path / "killed") == ["_SUCCESS", "part-00000.parquet"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "out", "--hashed-users", "-1"], "--hashed-users: -1 is negative"),
        (["prepare", "out", "--hashed-users", "x"], "--hashed-users: x is not an integer"),
        (["prepare", "out", "--test-fraction", "x"], "--test-fraction: x is not a finite number"),
        (["prepare", "out", "--min-rating", "nan"], "--min-rating: nan is not a finite number"),
        (["prepare", "out", "--synthetic", "--min-rating", "4"], "--min-rating goes with logs"),
        (["prepare", "out", "--synthetic", "--hashed-below", "4"], "goes with --hashed-users"),
        (["recommend", "run", "out", "--bogus"], "unrecognized arguments: --bogus"),
        (["recommend", "run"], "the following arguments are required: URL"),
        (["recomend"], "invalid choice: 'recomend'"),
        ([], "COMMAND"),
    ],
)
def test_wrong_words_are_one_line(words: list[str], said: str, capsys: Capsys) -> None:
    assert said in refusal(capsys, *words)


def test_no_run_there(tmp_path: Path, capsys: Capsys) -> None:
    for command in (["evaluate"], ["export"], ["recommend"]):
        extra = [] if command == ["evaluate"] else [tmp_path / "out"]
        assert "no run here" in refusal(capsys, *command, tmp_path / "nothing", *extra)


def test_a_run_without_a_checkpoint(config: str, tmp_path: Path, capsys: Capsys) -> None:
    assert main(["train", config]) == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert "no committed checkpoint" in refusal(capsys, "evaluate", tmp_path / "run")


def test_damaged_dataset(dataset: str, config: str, tmp_path: Path, capsys: Capsys) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    (copy / "graph/user_items-00000.bin").write_bytes(b"1234")
    line = refusal(capsys, "train", config, f"data.url={copy}")
    assert "user_items-00000.bin: damaged" in line
    (copy / "manifest.json").write_text("{}")
    assert "manifest.json: not a dataset manifest" in refusal(
        capsys, "train", config, f"data.url={copy}"
    )
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint(config: str, tmp_path: Path, capsys: Capsys) -> None:
    assert main(["train", config]) == 0
    newest = max((tmp_path / "run/checkpoints").iterdir())
    part = newest / "__0_0.distcp"
    part.write_bytes(part.read_bytes()[:1000])
    assert newest.name in refusal(capsys, "evaluate", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(config: str, capsys: Capsys) -> None:
    line = refusal(
        capsys, "train", config, "tables.optimizer=sgd", "tables.lr=1e30", "train.log_every=1"
    )
    assert "not a finite number at step 1;" in line and "tables.lr" in line


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("seen", ["before", "while writing"])
def test_a_full_disk_leaves_no_checkpoint_that_looks_whole(
    config: str, full_disk: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    if seen == "while writing":  # another program takes the room that there was
        usage = shutil.disk_usage(full_disk)._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    line = refusal(capsys, "train", config, f"run.dir={full_disk}/run", "model.dim=128")
    assert ("needs 1 MiB and 0 are free" if seen == "before" else "no space left") in line
    assert not list(full_disk.rglob("commit.json"))
    assert not list(full_disk.rglob("*.distcp"))


def test_read_only_output(config: str, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert "file/run" in refusal(capsys, "train", config, f"run.dir={tmp_path}/file/run")
    assert main(["train", config]) == 0
    assert "file/out" in refusal(capsys, "export", tmp_path / "run", tmp_path / "file/out")


# --- as a user types it ---------------------------------------------------------------------


def _shell(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cnsdiff_dist", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_training_is_quiet_and_says_what_it_does(config: str, tmp_path: Path) -> None:
    done = _shell("train", config)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "samples/s" in done.stdout and "left" in done.stdout
    assert lines[-1].startswith("finished: best valid_iid recall@20")
    assert len(lines) < 12


@pytest.mark.distributed
def test_a_world_size_that_does_not_fit(config: str, tmp_path: Path) -> None:
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 -m cnsdiff_dist train".split()
    command = [sys.executable, *words, config, "data.streams=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode != 0
    assert "a world of 2 ranks does not divide data.streams=1" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["", "prepare", "train", "evaluate", "export", "recommend"])
def test_help_reads_well(command: str, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as caught:
        main([word for word in (command, "--help") if word])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text or "a whole job" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_config_keys_can_be_listed(capsys: Capsys) -> None:
    assert main(["train", "--help-config"]) == 0
    assert "train.epochs" in capsys.readouterr().out


def test_no_credentials_in_what_is_shown_or_saved(
    config: str, tmp_path: Path, capsys: Capsys
) -> None:
    line = refusal(capsys, "train", config, "data.url=http://key:hunter2@127.0.0.1:9/data")
    assert "hunter2" not in line and "127.0.0.1" in line and "environment" in line
    line = refusal(capsys, "train", config, "run.dir=s3://key:hunter2@bucket/run")
    assert "hunter2" not in line and "environment" in line


def test_saved_json_is_whole(config: str, tmp_path: Path) -> None:
    assert main(["train", config]) == 0
    for name in ("dataset.json", "environment.json"):
        json.loads((tmp_path / "run" / name).read_text())
    leftovers = [
        name
        for name in files_under(tmp_path / "run")
        if "/." in f"/{name}" and ".metadata" not in name
    ]
    assert leftovers == []
