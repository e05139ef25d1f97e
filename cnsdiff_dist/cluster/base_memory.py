"""What a training process holds before it has a dataset."""

import os

import torch

from cnsdiff_dist import sections
from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.dense_engine import DenseEngine
from cnsdiff_dist.distributed.sharded_tables import ShardedTables
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.samplers.registry import SAMPLERS
from cnsdiff_dist.training import loop  # noqa: F401  (what a training imports counts)


def process_bytes(config: Config) -> int:
    """The memory of this process after a step of nothing: libraries import much of themselves
    only when they are first used."""
    world = join_world(config.run.timeout_seconds)
    tables = ShardedTables(1, 1, 4, sections.Tables(), 1, 0, world)  # the config's may need a GPU
    sampler = SAMPLERS[config.negatives.kind]
    has_network = sampler.make_network(config.generator, config.model.dim, 1) is not None
    network = torch.nn.Linear(4, 4) if has_network else None
    engine = DenseEngine(network, config.generator, 1)
    first = torch.zeros(1, dtype=torch.int64, device=world.device)
    rows = tables.lookup(first, first)
    engine.backward((engine.network(rows) if engine.network else rows).sum())
    engine.step()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
