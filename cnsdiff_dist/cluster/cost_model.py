"""Whether a config fits a cluster, and what a step costs there, before anything is started.

TorchRec's planner places the tables; the rest is counted here from the shapes of what the code
allocates and sends. Times are floors of bytes and operations over the rates in ``DEVICES``,
which are makers' figures for GPUs and measured ones for CPUs; nothing overlaps in them.

Shapes: N nodes of a rank's block, E edges in it, B rows of a rank, P vectors in a row's pool,
R rows that a rank owns, D embedding dim, W ranks.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from cnsdiff_dist.cluster.table_placement import PLACEMENTS, Link, TableShards, plan_tables
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.evaluation.top_k import ITEMS
from cnsdiff_dist.models.denoiser import Denoiser
from cnsdiff_dist.models.exact_propagation import EDGES, PIECE_BYTES, ROWS
from cnsdiff_dist.models.lightgcn import sampled_block
from cnsdiff_dist.models.recommender import is_sampled

GB = 10**9
HEADROOM = 0.1
"""Of a device's memory, for the allocator's gaps and the libraries' own."""
_FBGEMM_CPU_SECONDS = 0.8e-6  # per row looked up and updated, measured (docs/benchmarks.md)


@dataclass(frozen=True)
class Device:
    """A rank's share of its node: bandwidths in bytes a second and one way, memory in bytes,
    and multiply-adds a second of float32 (TF32 on a GPU) counted as two operations."""

    link: Link
    operations: float
    kernels_seconds: float


DEVICES = {
    # memory, PCIe, NVLink, network of one GPU; its HBM, and 1/8 of 2 TB of host memory
    "h100": Device(Link(3.35e12, 64e9, 450e9, 50e9, 80 * GB, 250 * GB), 495e12, 2e-3),
    "h200": Device(Link(4.8e12, 64e9, 450e9, 50e9, 141 * GB, 250 * GB), 495e12, 2e-3),
    "a100": Device(Link(2.04e12, 32e9, 300e9, 25e9, 80 * GB, 125 * GB), 156e12, 2e-3),
    # one core: copies, products and gloo over the loopback as measured where docs/benchmarks.md was
    "cpu": Device(Link(13e9, 13e9, 1.4e9, 1e9, 0, 0), 160e9, 5e-3),
}


@dataclass(frozen=True)
class Cluster:
    """``per_node`` ranks on each of ``nodes`` nodes."""

    device: str
    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def spec(self) -> Device:
        """On CPUs the memory is this machine's, shared among its ranks."""
        spec = DEVICES[self.device]
        if self.cuda:
            return spec
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return replace(spec, link=replace(spec.link, host_bytes=whole // self.per_node))


@dataclass(frozen=True)
class Sizes:
    """Of the dataset, and of a rank's block of one step."""

    users: int
    items: int
    edges: int
    block_nodes: int
    block_edges: int


@dataclass(frozen=True)
class Plan:
    """``device`` and ``host`` say where a rank's bytes go (on CPUs all is host memory);
    ``sent`` are bytes a rank sends per step, by link; ``seconds`` are the parts of a step."""

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


def make_plan(config: Config, cluster: Cluster, sizes: Sizes, base_bytes: int = 0) -> Plan:
    """A plan for the config's placement and, where it does not fit, what to change.

    ``base_bytes`` are what a process holds before it has tables.
    """
    plan = _plan(config, cluster, sizes, base_bytes, config.tables.placement)
    changes = _world_changes(config, cluster)
    if not plan.fits:
        changes += _what_fits(config, cluster, sizes, base_bytes, plan)
    return replace(plan, changes=changes)


def sizes_of(config: Config, cluster: Cluster, graph: GraphArrays, steps: int = 3) -> Sizes:
    """The mean block of some steps, sampled as the loader does it: positives by popularity."""
    rows = max(config.train.batch // cluster.ranks, 1)
    if not _sampled(config, graph.users + graph.items):
        bound = bounded_sizes(config, cluster, graph.users, graph.items, len(graph.user_items))
        return bound
    generator, found = np.random.default_rng(0), []
    for step in range(steps):
        edges = generator.integers(len(graph.user_items), size=rows)
        users = np.searchsorted(graph.user_indptr, edges, side="right") - 1
        others = generator.integers(graph.items, size=rows * _candidates(config))
        items = np.concatenate([np.asarray(graph.user_items[edges], np.int64), others])
        fan_out = config.model.fan_out[: config.model.layers]
        block = sampled_block(graph, users, items, fan_out, (0, 0, step))
        nonzero = sum(hop.operator.values().numel() for hop in block.hops)
        found.append((len(block.users) + len(block.items), nonzero))
    nodes, block_edges = np.mean(found, axis=0).round().astype(int).tolist()
    return Sizes(graph.users, graph.items, len(graph.user_items), nodes, block_edges)


def bounded_sizes(config: Config, cluster: Cluster, users: int, items: int, edges: int) -> Sizes:
    """From counts alone: no node of a block is there twice, which is more than ever happens."""
    nodes = users + items
    if not _sampled(config, nodes):
        return Sizes(users, items, edges, nodes, 2 * edges * config.model.layers)
    rows = max(config.train.batch // cluster.ranks, 1)
    hop = rows * (2 + _candidates(config))
    total, block_edges = hop, 0
    for fan in config.model.fan_out[: config.model.layers]:
        hop = min(hop * fan, 2 * edges)
        total, block_edges = total + hop, block_edges + hop
    return Sizes(users, items, edges, min(total, nodes), block_edges)


def _sampled(config: Config, nodes: int) -> bool:
    return config.model.layers == 0 or is_sampled(config, nodes)


def _candidates(config: Config) -> int:
    negatives = config.negatives
    if negatives.kind in ("uniform", "popularity", "mixed"):
        return negatives.count
    if negatives.kind in ("cnsdiff", "in_batch"):
        return int(negatives.kind == "cnsdiff" and negatives.share == "row")
    return 1 if negatives.kind == "cnsdiff_published" else negatives.candidates


def _plan(config: Config, cluster: Cluster, sizes: Sizes, base: int, placement: str) -> Plan:
    step = _step_bytes(config, cluster, sizes)
    graph = 4 * (2 if max(sizes.users, sizes.items) >= 2**31 else 1) * 2 * sizes.edges
    graph += 8 * (sizes.users + sizes.items)
    link = cluster.spec.link
    room = link.device_bytes if cluster.cuda else link.host_bytes
    reserved = min(HEADROOM + step / max(room, 1), 0.99)
    tables = plan_tables(
        config, (sizes.users, sizes.items), cluster.ranks, cluster.per_node, link, cluster.cuda,
        placement, sizes.block_nodes, reserved,
    )  # fmt: skip
    held = _fullest(tables or [], placement)
    on_device = held[0] if cluster.cuda else 0
    device = {"tables and optimizer": on_device, "step": step} if cluster.cuda else {}
    evaluation = _evaluation_bytes(config, cluster, sizes)
    on_host = 0 if cluster.cuda else step
    copy = sum(held) if config.checkpoint.background else 0
    # The nodes' page cache holds the graph once for all ranks; a process maps all of it. What a
    # step and a checkpoint hold is free again when an evaluation begins.
    host = {
        "process": base,
        "tables and optimizer": sum(held) - on_device,
        "graph (shared by the node's ranks)": graph // cluster.per_node if cluster.cuda else graph,
        "step": on_host,
        "checkpoint being written": copy,
        "evaluation, beyond these": max(evaluation - on_host - copy, 0),
    }
    sent = _sent(config, cluster, sizes)
    return Plan(
        cluster, placement, sizes, tables or [], device, host, sent,
        _seconds(config, cluster, sizes, sent),
    )  # fmt: skip


def _fullest(tables: list[TableShards], placement: str) -> tuple[int, int]:
    """Bytes of the fullest rank in its device's memory, and in the host's."""
    total = sum(table.bytes for table in tables)
    if placement == "device":
        return total, 0
    cached = total // 5  # TorchRec's default cache
    return cached, total if placement == "uvm" else 0


def _step_bytes(config: Config, cluster: Cluster, sizes: Sizes) -> int:
    """What a step holds at its fullest, in the backward of the encoder. The numbers of copies are
    fitted to runs on CPUs (docs/benchmarks.md)."""
    rows, dim = config.train.batch // cluster.ranks, config.model.dim
    whole = not _sampled(config, sizes.users + sizes.items)
    # Rows as they come from the tables and side by side, the gradient, and what is sent back;
    # of a whole graph also every layer's.
    lookup = 4 * (8 if whole else 4) * sizes.block_nodes * dim
    # An operator and its transpose: of this step and of those ahead; and, on the host, the
    # arrays of 64-bit numbers that one is sampled with. A whole graph's is there once.
    ahead = 0 if cluster.cuda else config.data.workers
    operator = sizes.block_edges * (16 * (2 + ahead) + 80 * ahead)
    if whole:
        operator = 2 * sizes.edges * (8 if cluster.cuda else 48)
    width = config.train.batch // config.data.streams
    pool = width + width * config.generator.train_share * len(config.generator.levels)
    shares = config.negatives.kind in ("cnsdiff", "in_batch", "mixed", "dmns")
    logits = 4 * 4 * rows * (pool if shares else _candidates(config))
    vectors = 12 * 4 * rows * (2 + _candidates(config)) * dim
    generator = 8 * 4 * rows * (3 * dim + 2 * config.generator.hidden)
    blocks = config.data.prefetch_blocks * config.data.streams // cluster.ranks + 1
    stream = 0 if cluster.cuda else 16 * 3 * min(
        blocks * config.data.block_rows, max(sizes.edges // cluster.ranks, 1)
    )  # fmt: skip
    return int(lookup + operator + logits + vectors + generator + stream)


def _evaluation_bytes(config: Config, cluster: Cluster, sizes: Sizes) -> int:
    """Own rows twice, a piece of the others', and the scores of everybody's users."""
    row = 4 * config.model.dim
    own = [-(-count // cluster.ranks) for count in (sizes.users, sizes.items)]
    copies = 2 if config.model.layers else 1
    others = min(PIECE_BYTES, max(own) * row) if cluster.ranks > 1 else 0
    # Rows on their way out of the tables, and of one product; places, columns and ones of edges.
    others += 7 * min(ROWS, max(own)) * row + 40 * min(EDGES, sizes.edges)
    scores = 4 * config.evaluation.users_per_chunk * cluster.ranks
    return copies * sum(own) * row + others + scores * min(ITEMS, own[1]) + 24 * own[1]


def _sent(config: Config, cluster: Cluster, sizes: Sizes) -> dict[str, int]:
    """Bytes that a rank sends in a step: ids and gradients of what it looked up, rows of what
    others did, and the generator's gradients."""
    ranks = cluster.ranks
    rows = sizes.block_nodes * (2 * 4 * config.model.dim + 8) * (ranks - 1) / ranks
    near = (cluster.per_node - 1) / max(ranks - 1, 1)
    generator = 2 * 4 * _parameters(config) * (ranks - 1) / ranks
    far = cluster.nodes > 1
    return {
        "within the node": int(rows * near + (0 if far else generator)),
        "between nodes": int(rows * (1 - near) + generator) if far else 0,
    }


def has_network(config: Config) -> bool:
    """Whether the sampler has a denoiser, and so an engine that trains it."""
    return config.negatives.kind.startswith(("cnsdiff", "dmns"))


def _parameters(config: Config) -> int:
    if not has_network(config):
        return 0
    generator = config.generator
    environments = 5 if "environment" in generator.condition else 0
    network = Denoiser(
        config.model.dim, generator.steps, generator.hidden, environments,
        "user" in generator.condition,
    )  # fmt: skip
    return sum(parameter.numel() for parameter in network.parameters())


def _seconds(
    config: Config, cluster: Cluster, sizes: Sizes, sent: dict[str, int]
) -> dict[str, float]:
    spec, dim = cluster.spec, config.model.dim
    link, rows = spec.link, config.train.batch // cluster.ranks
    row = 4 * dim
    tables = 5 * sizes.block_nodes * row / link.memory
    if not cluster.cuda:
        tables = sizes.block_nodes * _FBGEMM_CPU_SECONDS
    passes = 2 * sizes.block_edges * (row + 8) + 6 * sizes.block_nodes * row
    width = config.train.batch // config.data.streams
    share = config.generator.train_share
    pool = 3 * 2 * rows * width * (1 + share) * dim
    generator = 2 * (3 + len(config.generator.levels)) * rows * share * _parameters(config)
    return {
        "table lookup and update": tables,
        "propagation": passes / link.memory,
        "negatives and losses": (pool + generator) / spec.operations,
        "links": sent["within the node"] / link.within_node
        + sent["between nodes"] / link.between_nodes,
        "kernel launches and Python (a guess)": spec.kernels_seconds,
    }


def _world_changes(config: Config, cluster: Cluster) -> list[str]:
    if config.data.streams % cluster.ranks == 0:
        return []
    streams = cluster.ranks * -(-config.data.streams // cluster.ranks)
    batch = streams * -(-config.train.batch // streams)
    more = f" train.batch={batch}" if batch != config.train.batch else ""
    return [f"data.streams={streams}{more} (a multiple of the {cluster.ranks} ranks)"]


def _what_fits(config: Config, cluster: Cluster, sizes: Sizes, base: int, plan: Plan) -> list[str]:
    """Each of these alone is enough."""
    found = []
    others = [name for name in PLACEMENTS if cluster.cuda and name != plan.placement]
    for placement in others:
        if _plan(config, cluster, sizes, base, placement).fits:
            note = " (planned only: training from SSD is not supported)"
            found.append(f"tables.placement={placement}{note if placement == 'ssd' else ''}")
    halves = config.tables.model_copy(update={"user_dtype": "fp16", "item_dtype": "fp16"})
    narrow = config.model_copy(update={"tables": halves})
    if _plan(narrow, cluster, sizes, base, plan.placement).fits:
        found.append("tables.user_dtype=fp16 tables.item_dtype=fp16")
    nodes = cluster.nodes
    while nodes < 4096 * cluster.nodes:
        nodes *= 2
        larger = replace(cluster, nodes=nodes)
        fewer = replace(sizes, block_nodes=sizes.block_nodes * cluster.nodes // nodes)
        if _plan(config, larger, fewer, base, plan.placement).fits:
            found.append(f"--nodes {nodes}")
            break
    return found or ["nothing tried here is enough: a smaller model.dim or train.batch"]
