"""Checkpoints: which damage is seen, who may commit, and what a failed write leaves behind."""

import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.errors import TryAgain, UserError
from cnsdiff_dist.inference.trained_model import open_trained
from tests.support.ranks import run_ranks
from tests.support.sealing import seal
from tests.support.small import small_config
from tests.support.trainers import new_trainer


@pytest.fixture(scope="module")
def run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs with all its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    train(_config(dataset, folder))
    return folder


def _config(dataset: str, run: Path | str, **sections: dict[str, Any]) -> Config:
    train_section = {"epochs": 3, **sections.pop("train", {})}
    return small_config(dataset, run, train=train_section, checkpoint={"keep": 9}, **sections)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def _steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def _resume(dataset: str, run: Path, world: World) -> tuple[int, list[str]]:
    """The step from which a training continues, and what it says of damaged checkpoints."""
    said: list[str] = []
    commit = new_trainer(_config(dataset, run), world).resume(said.append)
    return (commit.step if commit else 0), said


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "commit.json"])
def test_any_flipped_bit_is_seen_and_the_checkpoint_before_is_used(
    dataset: str, copy: Path, world: World, name: str
) -> None:
    *_, before, newest = _steps(copy)
    size = (newest / name).stat().st_size
    for place in (0, size // 2, size - 4):
        _flip(newest / name, place)
        checkpoints = Checkpoints(str(copy), world)
        assert checkpoints.damage(checkpoints.committed()[-1]), (name, place)
        _flip(newest / name, place)
    _flip(newest / name, size // 2)
    step, (said,) = _resume(dataset, copy, world)
    assert f"step-{step:08d}" == before.name
    assert newest.name in said and name in said and "the one before is used" in said
    # The damaged checkpoint no longer counts; the next commit deletes what is left of it.
    assert not (newest / "commit.json").exists()
    train(_config(dataset, copy))
    assert not any((step / "damaged.json").exists() for step in _steps(copy))
    assert (newest / "commit.json").exists()


@pytest.mark.parametrize("harm", ["missing", "short", "long"])
def test_a_file_that_is_not_whole_is_named(copy: Path, world: World, harm: str) -> None:
    path = _steps(copy)[-1] / "__0_0.distcp"
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[:-1] if harm == "short" else content + b"0")
    checkpoints = Checkpoints(str(copy), world)
    damage = checkpoints.damage(checkpoints.committed()[-1])
    expected = "is missing" if harm == "missing" else f"bytes, not {len(content)}"
    assert damage and "__0_0.distcp" in damage and expected in damage


def test_a_run_without_any_whole_checkpoint_does_not_start_anew(
    dataset: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in _steps(copy):
        _flip(step / "__0_0.distcp", 50)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train(_config(dataset, copy))


def test_a_damaged_best_checkpoint_is_not_served(copy: Path) -> None:
    best = Path(open_trained(str(copy), None).run.url, "checkpoints")
    for step in _steps(copy):
        _flip(step / "__0_0.distcp", 50)
    with pytest.raises(UserError, match=rf"{best}.*damaged \(the sha256 of __0_0.distcp"):
        open_trained(str(copy), None)


def _metadata(run: Path) -> tuple[Path, Metadata]:
    path = _steps(run)[-1] / ".metadata"
    return path, pickle.loads(path.read_bytes())


def test_what_is_no_tensor_is_not_unpickled(dataset: str, copy: Path, world: World) -> None:
    """torch loads an entry of bytes with pickle: a checkpoint could run code through one."""
    path, metadata = _metadata(copy)
    name = "tables.weights.user"
    shard = next(index for index in metadata.storage_data if index.fqn == name)
    info = metadata.storage_data.pop(shard)
    bomb = pickle.dumps(_Touch(str(copy / "owned")))
    data = path.parent / info.relative_path
    info.offset, info.length = data.stat().st_size, len(bomb)
    with data.open("ab") as file:
        file.write(bomb)
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[type(shard)(name)] = info
    path.write_bytes(pickle.dumps(metadata))
    seal(path.parent)
    with pytest.raises(UserError, match=f"{name} is no tensor: not a checkpoint of ours"):
        _resume(dataset, copy, world)
    assert not (copy / "owned").exists()


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_a_checkpoint_cannot_name_files_outside_itself(
    dataset: str, copy: Path, world: World
) -> None:
    path, metadata = _metadata(copy)
    shutil.copy(path.parent / "__0_0.distcp", copy / "elsewhere")
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    path.write_bytes(pickle.dumps(metadata))
    seal(path.parent)
    with pytest.raises(UserError, match=r"names a file '\.\./\.\./elsewhere' not its own"):
        _resume(dataset, copy, world)


# --- writing --------------------------------------------------------------------------------


def test_only_the_last_training_that_claimed_a_run_may_commit(tmp_path: Path, world: World) -> None:
    old, new = Checkpoints(str(tmp_path), world), Checkpoints(str(tmp_path), world)
    state = {"x": torch.arange(5.0)}
    old.save(1, state, {})
    old.wait()
    new.claim()
    old.save(2, state, {})
    with pytest.raises(UserError, match=r"another training .* took over this run"):
        old.wait()
    assert [commit.step for commit in new.committed()] == [1]
    new.save(2, state, {})
    new.wait()
    assert [commit.step for commit in new.committed()] == [2]


def test_what_is_saved_is_the_state_at_that_step(tmp_path: Path, world: World) -> None:
    checkpoints, gate = Checkpoints(str(tmp_path), world), threading.Event()
    write = checkpoints._write_files
    checkpoints._write_files = lambda job: (gate.wait(), write(job))[1]  # type: ignore[assignment]
    state = {"x": torch.zeros(1000)}
    checkpoints.save(1, state, {})
    assert not checkpoints.committed()
    state["x"] += 1  # the next step, while the first is being written
    gate.set()
    checkpoints.wait()
    found = {"x": torch.empty(1000)}
    checkpoints.load(checkpoints.committed()[0], found)
    assert torch.equal(found["x"], torch.zeros(1000))


def test_no_room_is_seen_before_anything_is_written(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    checkpoints = Checkpoints(str(tmp_path), world)
    with pytest.raises(UserError, match=r"needs 4 MiB and 3 are free; free some"):
        checkpoints.save(1, {"x": torch.zeros(1 << 20)}, {})
    assert not _steps(tmp_path)


class _Flaky:
    """A memory:// store that fails to open files for writing the first ``failures`` times."""

    def __init__(self, failures: float, monkeypatch: pytest.MonkeyPatch) -> None:
        import fsspec

        kind = type(fsspec.filesystem("memory"))
        self.left, self._open = failures, kind.open
        monkeypatch.setattr(kind, "open", lambda *words, **more: self.open(*words, **more))

    def open(self, fs: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode and path.endswith(".distcp") and self.left > 0:
            self.left -= 1
            raise ConnectionError("the store is restarting")
        return self._open(fs, path, mode, **more)


def test_a_write_that_fails_for_a_while_is_begun_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints("memory://flaky-writes/run", world)
    flaky = _Flaky(2, monkeypatch)
    with storage.patient(60):
        checkpoints.save(1, {"x": torch.ones(3)}, {})
        checkpoints.wait()
    assert flaky.left == 0
    assert checkpoints.damage(checkpoints.committed()[0]) is None


def test_a_write_that_keeps_failing_leaves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints("memory://no-writes/run", world)
    _Flaky(float("inf"), monkeypatch)
    with storage.patient(0):
        checkpoints.save(1, {"x": torch.ones(3)}, {})
        with pytest.raises(TryAgain, match="cannot write: the host does not answer"):
            checkpoints.wait()
    assert not checkpoints.committed()
    assert storage.list_files("memory://no-writes/run/checkpoints") == ["owner.json"]


def _save_on_ranks(url: str, failing: int | None) -> Any:
    world = join_world(60)
    checkpoints = Checkpoints(url, world)
    state = {"x": torch.full((3,), 1.0 + world.rank), f"own-{world.rank}": torch.ones(2)}
    if world.rank == failing:
        Path(url, "checkpoints/step-00000001").mkdir(parents=True)
        checkpoints._write_files = _break  # type: ignore[method-assign]
    checkpoints.save(1, state, {})
    try:
        checkpoints.wait()
    except UserError as error:
        return str(error)
    return [commit.record["files"] for commit in checkpoints.committed()]


def _break(job: Any) -> Any:
    raise UserError("this rank cannot write")


@pytest.mark.distributed
def test_a_commit_lists_the_files_of_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, _save_on_ranks, str(tmp_path), None)
    assert first == second
    assert set(first[0]) == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_a_run_in_memory_is_continued(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run works at any fsspec URL: it needs put, get, list and delete."""
    config = _config(dataset, "memory://runs/first", train={"epochs": 1})
    train(config)
    train(_config(dataset, "memory://runs/first", train={"epochs": 2}))
    assert "resumed from memory://runs/first/checkpoints/step-" in capsys.readouterr().out
    assert main(["evaluate", "memory://runs/first", "--split", "test_ood"]) == 0
