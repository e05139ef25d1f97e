"""A checkpoint's metadata with values that its reader does not expect."""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.support.hostile import Victim, within
from tests.support.hostile_datasets import REFUSED
from tests.support.sealing import seal

Change = Callable[[Any], None]


def _each(owner: str, change: Change) -> Change:
    def act(metadata: Any) -> None:
        for value in getattr(metadata, owner).values():
            change(value)

    return act


_each_tensor, _each_place = (partial(_each, n) for n in ("state_dict_metadata", "storage_data"))


def _set(name: str, value: Any) -> Change:
    return lambda owner: object.__setattr__(owner, name, value)


def _set_chunks(offsets: list[int], sizes: list[int]) -> Change:
    def change(tensor: Any) -> None:
        for chunk in tensor.chunks:
            object.__setattr__(chunk, "offsets", torch.Size(offsets[: len(chunk.offsets)]))
            object.__setattr__(chunk, "sizes", torch.Size(sizes[: len(chunk.sizes)]))

    return change


HUGE = 2**62
CHANGES: dict[str, Change] = {
    "size": _each_tensor(_set("size", torch.Size([HUGE, HUGE]))),
    "size is text": _each_tensor(_set("size", "x" * 100)),
    "chunks": _each_tensor(_set_chunks([0, 0], [2**40, 2**20])),
    "chunks below zero": _each_tensor(_set_chunks([-(2**40), 0], [2**41, 16])),
    "chunks of none": _each_tensor(_set("chunks", None)),
    "many chunks": _each_tensor(lambda t: object.__setattr__(t, "chunks", t.chunks * 200)),
    "no chunks": _each_tensor(_set("chunks", [])),
    "properties": _each_tensor(_set("properties", None)),
    "offset": _each_place(_set("offset", HUGE)),
    "negative offset": _each_place(_set("offset", -1)),
    "length": _each_place(_set("length", HUGE)),
    "negative length": _each_place(_set("length", -1)),
    "text length": _each_place(_set("length", "x")),
    "path is a number": _each_place(_set("relative_path", 7)),
    "path is a list": _each_place(_set("relative_path", ["__0_0.distcp"])),
    "path up": _each_place(_set("relative_path", "../../secret")),
    "absolute path": _each_place(_set("relative_path", "/etc/passwd")),
    "path of another": _each_place(_set("relative_path", ".metadata")),
    "path of the commit": _each_place(_set("relative_path", "commit.json")),
    "url": _each_place(_set("relative_path", "memory://x")),
    "transforms": _each_place(_set("transform_descriptors", ["zstd"])),
    "unknown transforms": _each_place(_set("transform_descriptors", [1])),
    "no storage": _set("storage_data", None),
    "storage is a list": _set("storage_data", [1]),
    "empty storage": _set("storage_data", {}),
    "no tensors": _set("state_dict_metadata", {}),
    "tensors are none": _set("state_dict_metadata", None),
    "planner": _set("planner_data", {"tables.weights.user": ("..", "x")}),
    "meta": _set("storage_meta", "x"),
    "version": _set("version", "x" * 10),
}


@pytest.mark.parametrize("name", CHANGES)
def test_metadata_with_other_values(attacked: Victim, name: str) -> None:
    (attacked.folder.parent / "secret").write_bytes(b"hunter2")
    path = attacked.restore() / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    CHANGES[name](metadata)
    path.write_bytes(pickle.dumps(metadata))
    seal(path.parent)
    with within(60):
        assert attacked.open() in (REFUSED, attacked.best)
        assert attacked.resume() in (REFUSED, attacked.resumed)
