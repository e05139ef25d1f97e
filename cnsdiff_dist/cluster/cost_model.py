"""What a run would need of a cluster: memory, bytes sent and time of a step.

TorchRec's planner places the tables; the rest is counted here from the shapes of what the code
allocates and sends. Times are floors: bytes and operations over the rates of the hardware, with
nothing overlapping.

Shapes: B rows of a rank, N negatives of its own, P vectors in a row's pool, R rows that a rank
owns, D embedding dimension.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cnsdiff_dist.cluster.hardware import Cluster
from cnsdiff_dist.cluster.step_sizes import Sizes, footprint_of, needs_own_rows_only
from cnsdiff_dist.cluster.table_placement import TableShards, place_tables
from cnsdiff_dist.config import Config
from cnsdiff_dist.evaluation.top_k import ITEMS_AT_A_TIME
from cnsdiff_dist.models.exact_propagation import EDGES, PIECE_BYTES, ROWS
from cnsdiff_dist.samplers.registry import SAMPLERS

HEADROOM = 0.1
"""Of a device's memory, for the allocator's gaps and what libraries hold."""
_FBGEMM_CPU_SECONDS = 0.8e-6  # per row looked up and updated, measured (docs/benchmarks.md)
_ENVIRONMENTS = 5  # as `cnsdiff prepare` makes them by default


@dataclass(frozen=True)
class Job:
    """A config on a cluster, with what a step of it touches."""

    config: Config
    cluster: Cluster
    sizes: Sizes

    @property
    def rows(self) -> int:
        """B, of a rank's step."""
        return self.config.train.batch // self.cluster.ranks

    @property
    def whole_graph(self) -> bool:
        """Whether a step propagates over the whole graph."""
        nodes = self.sizes.users + self.sizes.items
        return not needs_own_rows_only(self.config, nodes)

    @property
    def negatives(self) -> int:
        """N + P, the logits of a row besides its positive's."""
        footprint = footprint_of(self.config)
        return footprint.own + footprint.pool

    @property
    def network_parameters(self) -> int:
        """Of what the sampler trains beside the tables; 0 without a network."""
        config = self.config
        sampler = SAMPLERS[config.negatives.kind]
        network = sampler.make_network(config.generator, config.model.dim, _ENVIRONMENTS)
        return sum(parameter.numel() for parameter in network.parameters()) if network else 0


@dataclass(frozen=True)
class Estimate:
    """What a job needs.

    Attributes:
        placement: of the tables; ``device``, ``uvm`` or ``ssd``.
        device, host: where a rank's bytes go; on CPUs all of it is host memory.
        sent: bytes that a rank sends in a step, by link.
        seconds: the parts of a step.
        changes: what to change so that it fits, or that training needs.
    """

    cluster: Cluster
    placement: str
    sizes: Sizes
    tables: list[TableShards]
    device: dict[str, int]
    host: dict[str, int]
    sent: dict[str, int]
    seconds: dict[str, float]
    changes: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return not self.over

    @property
    def over(self) -> list[str]:
        """The memories that do not suffice."""
        link = self.cluster.spec.link
        sides = (("GPU", self.device, link.device_bytes), ("host", self.host, link.host_bytes))
        found = [side for side, parts, room in sides if sum(parts.values()) > room * (1 - HEADROOM)]
        tables_on = "GPU" if self.cluster.cuda else "host"
        return found if self.tables or tables_on in found else [tables_on, *found]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits, "over": self.over}


def estimate(job: Job, base_bytes: int, placement: str) -> Estimate:
    """What a job needs under a placement of its tables.

    ``base_bytes`` are what a process holds before it has tables.
    """
    cluster, link = job.cluster, job.cluster.spec.link
    step = step_bytes(job)
    room = link.device_bytes if cluster.cuda else link.host_bytes
    reserved = min(HEADROOM + step / max(room, 1), 0.99)
    tables = place_tables(job.config, cluster, job.sizes, placement, reserved) or []
    held = _fullest_rank(tables, placement)
    device = {"tables and optimizer": held[0], "step": step} if cluster.cuda else {}
    host = _host_bytes(job, base_bytes, step, held)
    sent = _sent(job)
    return Estimate(cluster, placement, job.sizes, tables, device, host, sent, _seconds(job, sent))


def _host_bytes(job: Job, base: int, step: int, held: tuple[int, int]) -> dict[str, int]:
    """The parts of a rank's host memory.

    The page cache of a node holds the graph once for all its ranks; a process maps all of it.
    What a step and a checkpoint hold is free again when an evaluation begins.
    """
    cluster, sizes = job.cluster, job.sizes
    graph = 4 * (2 if max(sizes.users, sizes.items) >= 2**31 else 1) * 2 * sizes.edges
    graph += 8 * (sizes.users + sizes.items)
    on_device = held[0] if cluster.cuda else 0
    on_host = 0 if cluster.cuda else step
    copy = sum(held) if job.config.checkpoint.background else 0
    return {
        "process": base,
        "tables and optimizer": sum(held) - on_device,
        "graph (shared by the node's ranks)": graph // cluster.per_node if cluster.cuda else graph,
        "step": on_host,
        "checkpoint being written": copy,
        "evaluation, beyond these": max(_evaluation_bytes(job) - on_host - copy, 0),
    }


def _fullest_rank(tables: list[TableShards], placement: str) -> tuple[int, int]:
    """Bytes of the fullest rank in the memory of its device, and in that of the host."""
    total = sum(table.bytes for table in tables)
    if placement == "device":
        return total, 0
    cached = total // 5  # TorchRec's default cache
    return cached, total if placement == "uvm" else 0


def step_bytes(job: Job) -> int:
    """What a step holds at its fullest, in the backward of the encoder.

    The numbers of copies are fitted to runs on CPUs (docs/benchmarks.md).
    """
    config, cluster, sizes, dim = job.config, job.cluster, job.sizes, job.config.model.dim
    # Rows as they come from the tables and side by side, the gradient, and what is sent back;
    # of a whole graph also every layer's.
    lookup = 4 * (8 if job.whole_graph else 4) * sizes.block_nodes * dim
    # An operator and its transpose: of this step and of those ahead; and, on the host, the
    # arrays of 64-bit numbers that one is sampled with. A whole graph's is there once.
    ahead = 0 if cluster.cuda else config.data.workers
    operator = sizes.block_edges * (16 * (2 + ahead) + 80 * ahead)
    if job.whole_graph:
        operator = 2 * sizes.edges * (8 if cluster.cuda else 48)
    logits = 4 * 4 * job.rows * job.negatives
    vectors = 12 * 4 * job.rows * (2 + footprint_of(config).candidates) * dim
    generator = 8 * 4 * job.rows * (3 * dim + 2 * config.generator.hidden)
    if not job.network_parameters:
        generator = 0
    stream = 0 if cluster.cuda else _stream_bytes(job)
    return int(lookup + operator + logits + vectors + generator + stream)


def _stream_bytes(job: Job) -> int:
    """Blocks of rows that the stream has read ahead."""
    data, ranks = job.config.data, job.cluster.ranks
    blocks = data.prefetch_blocks * data.streams // ranks + 1
    return 16 * 3 * min(blocks * data.block_rows, max(job.sizes.edges // ranks, 1))


def _evaluation_bytes(job: Job) -> int:
    """Own rows twice, a piece of the others', and the scores of all ranks' users."""
    config, cluster, sizes = job.config, job.cluster, job.sizes
    row = 4 * config.model.dim
    own = [-(-count // cluster.ranks) for count in (sizes.users, sizes.items)]
    copies = 2 if config.model.layers else 1
    others = min(PIECE_BYTES, max(own) * row) if cluster.ranks > 1 else 0
    # Rows on their way out of the tables, and of one product; places, columns and ones of edges.
    others += 7 * min(ROWS, max(own)) * row + 40 * min(EDGES, sizes.edges)
    scores = 4 * config.evaluation.users_per_chunk * cluster.ranks
    return copies * sum(own) * row + others + scores * min(ITEMS_AT_A_TIME, own[1]) + 24 * own[1]


def _sent(job: Job) -> dict[str, int]:
    """Bytes that a rank sends in a step: ids and gradients of what it looked up, rows of what
    other ranks looked up, and the gradients of the network."""
    cluster, ranks = job.cluster, job.cluster.ranks
    rows = job.sizes.block_nodes * (2 * 4 * job.config.model.dim + 8) * (ranks - 1) / ranks
    near = (cluster.per_node - 1) / max(ranks - 1, 1)
    network = 2 * 4 * job.network_parameters * (ranks - 1) / ranks
    far = cluster.nodes > 1
    return {
        "within the node": int(rows * near + (0 if far else network)),
        "between nodes": int(rows * (1 - near) + network) if far else 0,
    }


def _seconds(job: Job, sent: dict[str, int]) -> dict[str, float]:
    spec, sizes, dim = job.cluster.spec, job.sizes, job.config.model.dim
    link, row, generator = spec.link, 4 * dim, job.config.generator
    tables = 5 * sizes.block_nodes * row / link.memory
    if not job.cluster.cuda:
        tables = sizes.block_nodes * _FBGEMM_CPU_SECONDS
    passes = 2 * sizes.block_edges * (row + 8) + 6 * sizes.block_nodes * row
    scores = 3 * 2 * job.rows * job.negatives * dim
    learned = job.rows * generator.train_share
    network = 2 * (3 + len(generator.levels)) * learned * job.network_parameters
    return {
        "table lookup and update": tables,
        "propagation": passes / link.memory,
        "negatives and losses": (scores + network) / spec.operations,
        "links": sent["within the node"] / link.within_node
        + sent["between nodes"] / link.between_nodes,
        "kernel launches and Python (a guess)": spec.kernels_seconds,
    }


def with_tables(job: Job, **values: str) -> Job:
    """The same job with other values of the section ``tables``."""
    tables = job.config.tables.model_copy(update=values)
    return replace(job, config=job.config.model_copy(update={"tables": tables}))
