"""Read the tensors of a committed checkpoint as a whole, and compare tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def read_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a committed checkpoint, put together from its shards, and its progress."""
    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(checkpoint), _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    progress = json.loads((checkpoint / "commit.json").read_text())["progress"]
    return dict(_flat(state)), progress


def _flat(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}/")
        else:
            yield above + name, value


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the tensor's own size; 0 only for the same bits."""
    if torch.equal(a, b):
        return 0.0
    difference = float((a.double() - b.double()).abs().max())
    return max(difference / max(float(b.abs().max()), 1e-30), 1e-30)
