"""What a checkpoint's pickle may name: old enums are read, code is refused."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.inference.trained_model import open_trained
from tests.support.sealing import seal
from tests.support.small import small_config


def _pickled_call(module: str, name: str, *words: Any) -> bytes:
    """A pickle that calls a function of a module."""
    parts = [pickle.SHORT_BINUNICODE + bytes([len(w)]) + w.encode() for w in (module, name)]
    arguments = pickle.dumps(words, protocol=2)[2:-1]
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STACK_GLOBAL + arguments + b"R."


@pytest.mark.parametrize("name", ["posix mkdir", "torch.distributed.checkpoint.metadata os.mkdir"])
def test_a_checkpoint_that_would_run_code_is_refused(
    name: str, dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(dataset, tmp_path / "run", train={"epochs": 1})
    train(config)
    (commit,) = Checkpoints(config.run.dir, world).committed()
    payload = _pickled_call(*name.split(), str(tmp_path / "owned"))
    (Path(commit.url) / ".metadata").write_bytes(payload)
    seal(Path(commit.url))
    with pytest.raises(UserError, match="not a checkpoint of ours"):
        open_trained(config.run.dir, None)
    assert not (tmp_path / "owned").exists()
    pickle.loads(payload)
    assert (tmp_path / "owned").exists()  # it would have


class _AsPython311(pickle.Pickler):
    """Pickles enum members as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def test_checkpoints_of_every_python_311_can_be_read(
    dataset: str, tmp_path: Path, world: World
) -> None:
    config = small_config(dataset, tmp_path / "run", train={"epochs": 1})
    train(config)
    (commit,) = Checkpoints(config.run.dir, world).committed()
    path = Path(commit.url) / ".metadata"
    with path.open("rb") as file:
        metadata = pickle.load(file)
    with path.open("wb") as file:
        _AsPython311(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    seal(path.parent)
    open_trained(config.run.dir, None)

    path.write_bytes(_pickled_call("builtins", "getattr", "text", "upper"))
    seal(path.parent)
    with pytest.raises(UserError, match="of no enum: not a checkpoint of ours"):
        open_trained(config.run.dir, None)
