"""Where the rows of the tables would lie on some cluster: TorchRec's planner, offline.

It needs no process group and no device, since the tables are on the meta device.
"""

from dataclasses import dataclass
from typing import Any

from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError

from cnsdiff_dist.cluster.hardware import Cluster
from cnsdiff_dist.cluster.step_sizes import Sizes
from cnsdiff_dist.config import Config
from cnsdiff_dist.distributed.embedding_tables import TABLES
from cnsdiff_dist.distributed.sharded_tables import KERNELS, collection_to_shard

PLACEMENTS = {**KERNELS, "ssd": EmbeddingComputeKernel.KEY_VALUE.value}
_STATES = {  # floats of optimizer state per row, and per element
    "rowwise_adagrad": (1, 0),
    "adagrad": (0, 1),
    "sgd": (0, 0),
    "adam": (0, 2),
    "partial_rowwise_adam": (1, 1),
}


@dataclass(frozen=True)
class TableShards:
    """Where one table lies.

    Attributes:
        shards: (rank, rows, columns) of every rank that has a shard.
        bytes: with optimizer state, on the fullest rank.
        milliseconds: of a step, as TorchRec estimates them.
    """

    name: str
    rows: int
    sharding: str
    kernel: str
    shards: list[tuple[int, int, int]]
    bytes: int
    milliseconds: float


def place_tables(
    config: Config, cluster: Cluster, sizes: Sizes, placement: str, reserved: float
) -> list[TableShards] | None:
    """Shard both tables, or None if they do not fit.

    ``reserved`` is the share of a rank's memory that is kept for everything else.
    """
    rows = (sizes.users, sizes.items)
    collection = collection_to_shard(*rows, config.model.dim, config.tables, config.data.streams)
    constraint = ParameterConstraints(
        sharding_types=[config.tables.sharding],
        compute_kernels=[PLACEMENTS[placement]],
        num_poolings=[1.0],
        batch_sizes=[max(sizes.block_nodes // 2, 1)],
        pooling_factors=[1.0],
    )
    planner = EmbeddingShardingPlanner(
        topology=_topology(cluster),
        constraints=dict.fromkeys(TABLES, constraint),
        debug=False,
        stats=[],
        storage_reservation=FixedPercentageStorageReservation(reserved),
    )
    sharder: Any = EmbeddingCollectionSharder()
    try:
        planner.plan(collection, [sharder])
    except PlannerError:
        return None
    return [_shards(option, config) for option in planner._best_plan or []]


def _topology(cluster: Cluster) -> Topology:
    """The cluster as TorchRec sees it, with bandwidths in bytes a millisecond."""
    link, cuda = cluster.spec.link, cluster.cuda
    return Topology(
        world_size=cluster.ranks,
        local_world_size=cluster.per_node,
        compute_device="cuda" if cuda else "cpu",
        hbm_cap=link.device_bytes if cuda else 0,
        ddr_cap=link.host_bytes,
        hbm_mem_bw=link.memory / 1e3,
        ddr_mem_bw=(link.host if cuda else link.memory) / 1e3,
        intra_host_bw=link.within_node / 1e3,
        inter_host_bw=link.between_nodes / 1e3,
    )


def _shards(option: Any, config: Config) -> TableShards:
    per_row, per_element = _STATES[config.tables.optimizer]
    width = 2 if config.tables.dtype(option.name) == "fp16" else 4
    shards = [(shard.rank, *shard.size) for shard in option.shards]
    held: dict[int, int] = {}
    for rank, rows, columns in shards:
        held[rank] = held.get(rank, 0) + rows * (columns * (width + 4 * per_element) + 4 * per_row)
    return TableShards(
        name=option.name,
        rows=option.tensor.shape[0],
        sharding=option.sharding_type,
        kernel=option.compute_kernel,
        shards=shards,
        bytes=max(held.values()),
        milliseconds=float(max(shard.perf.total for shard in option.shards)),
    )
