"""The tree of tensors that a checkpoint saves: nested dicts of tensors and sharded tensors."""

import copy
import shutil
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from cnsdiff_dist import storage
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError


def local_tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors that this rank holds, which are its shards of sharded tensors."""
    if isinstance(state, dict):
        for value in state.values():
            yield from local_tensors(value)
    elif isinstance(state, ShardedTensor):
        yield from (shard.tensor for shard in state.local_shards())
    else:
        yield state


def host_copy(state: Any) -> Any:
    """Copy a state into host memory, so that the next steps do not change it."""
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    if isinstance(state, ShardedTensor) and not state.local_shards():
        return state
    return copy.deepcopy(state) if state.device.type == "cpu" else state.to(device="cpu")


def refuse_without_space(url: str, state: dict[str, Any], world: World) -> None:
    """Check that a local disk has space for the state of all ranks of its node. Collective.

    Raises:
        UserError: on every rank, when the disk of one of them is too full.
    """
    if not storage.is_local(url):
        return
    folder = storage.local_path(url)
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in local_tensors(state)) * world.local_size
    free = shutil.disk_usage(folder).free
    line = (
        f"{folder}: a checkpoint needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free"
    )
    lines = world.gather_objects(line if free < needed else None)
    if first := next(filter(None, lines), None):
        raise UserError(f"{first}; free some, lower checkpoint.keep, or move run.dir")
