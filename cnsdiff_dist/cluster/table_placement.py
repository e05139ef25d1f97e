"""Where the tables' rows would lie on some cluster: TorchRec's planner, offline.

No process group and no device is needed: the tables are on the meta device.
"""

from dataclasses import dataclass
from typing import Any

from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.embedding_tables import TABLES
from cnsdiff_dist.distributed.sharded_tables import KERNELS, described

PLACEMENTS = {**KERNELS, "ssd": EmbeddingComputeKernel.KEY_VALUE.value}
_STATES = {  # floats of optimizer state per row, and per element
    "rowwise_adagrad": (1, 0), "adagrad": (0, 1), "sgd": (0, 0), "adam": (0, 2),
    "partial_rowwise_adam": (1, 1),
}  # fmt: skip


@dataclass(frozen=True)
class Link:
    """Bytes a second of a rank, one way, and bytes that it has room for."""

    memory: float
    host: float
    within_node: float
    between_nodes: float
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class TableShards:
    """One table: the shard of each rank that has one as (rank, rows, columns), its bytes with
    optimizer state on the fullest rank, and TorchRec's estimate of its milliseconds a step."""

    name: str
    rows: int
    sharding: str
    kernel: str
    shards: list[tuple[int, int, int]]
    bytes: int
    milliseconds: float


def plan_tables(
    config: Config, counts: tuple[int, int], ranks: int, per_node: int, link: Link, cuda: bool,
    placement: str, ids: int, reserved: float,
) -> list[TableShards] | None:  # fmt: skip
    """Shard both tables, or None if they do not fit.

    ``ids`` are the distinct rows that a rank looks up in a step; ``reserved`` is the share of a
    rank's memory that is kept for everything else.
    """
    collection = described(*counts, config.model.dim, config.tables, config.data.streams)
    topology = Topology(
        world_size=ranks, local_world_size=per_node, compute_device="cuda" if cuda else "cpu",
        hbm_cap=link.device_bytes if cuda else 0, ddr_cap=link.host_bytes,
        hbm_mem_bw=link.memory / 1e3, ddr_mem_bw=(link.host if cuda else link.memory) / 1e3,
        intra_host_bw=link.within_node / 1e3, inter_host_bw=link.between_nodes / 1e3,
    )  # fmt: skip
    constraint = ParameterConstraints(
        sharding_types=[config.tables.sharding], compute_kernels=[PLACEMENTS[placement]],
        num_poolings=[1.0], batch_sizes=[max(ids // 2, 1)], pooling_factors=[1.0],
    )  # fmt: skip
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints=dict.fromkeys(TABLES, constraint), debug=False, stats=[],
        storage_reservation=FixedPercentageStorageReservation(reserved),
    )  # fmt: skip
    sharder: Any = EmbeddingCollectionSharder()
    try:
        planner.plan(collection, [sharder])
    except PlannerError:
        return None
    return [_shards(option, config) for option in planner._best_plan or []]


def _shards(option: Any, config: Config) -> TableShards:
    per_row, per_element = _STATES[config.tables.optimizer]
    width = 2 if config.tables.dtype(option.name) == "fp16" else 4
    shards = [(shard.rank, *shard.size) for shard in option.shards]
    held: dict[int, int] = {}
    for rank, rows, columns in shards:
        held[rank] = held.get(rank, 0) + rows * (columns * (width + 4 * per_element) + 4 * per_row)
    slowest = max(shard.perf.total for shard in option.shards)
    return TableShards(
        option.name, option.tensor.shape[0], option.sharding_type, option.compute_kernel, shards,
        max(held.values()), float(slowest),
    )  # fmt: skip
