"""Read sharded tables as a whole."""

from typing import Any

import torch

from cnsdiff_dist.distributed.world import World


def gather(sharded: Any, world: World) -> torch.Tensor:
    """The whole table of a ShardedTensor, on every rank."""
    whole = torch.zeros(sharded.size())
    for shard in sharded.local_shards():
        (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = shard.tensor.detach()
    return world.sum(whole)
