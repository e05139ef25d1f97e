"""``cnsdiff plan``: does this config fit that cluster, and what will a step cost?"""

import argparse
import json
import os
from typing import TYPE_CHECKING

from cnsdiff_dist.config import Config, Tables, load_config
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.cluster.cost_model import Cluster, Plan, Sizes

_EPILOG = """\
examples:
  cnsdiff plan configs/demo.yaml --gpus-per-node 2 --device cpu
  cnsdiff plan configs/demo.yaml model.dim=128 data.streams=32 --nodes 4 --gpus-per-node 8 \\
      --device h100 --users 2e9 --items 1e8 --edges 2e10
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say whether a config fits a cluster, and what a step costs there",
        description="Place the tables with TorchRec's planner, count the bytes of the rest, and "
        "say what to change if they do not fit. Offline: no GPU is needed. With the config's "
        "dataset the blocks of a few steps are really sampled; with --users, --items and --edges "
        "no dataset is needed. Exit code 2 if it does not fit.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a config key")
    add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def add_cluster(parser: "argparse._ActionsContainer") -> None:
    """The options that say how large the cluster and the data are."""
    parser.add_argument("--nodes", type=count, default=1, help="default: %(default)s")
    parser.add_argument(
        "--gpus-per-node", type=count, default=1, metavar="G",
        help="ranks of a node, also on CPUs; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("h100", "h200", "a100", "cpu"), default="h100",
        help="default: %(default)s",
    )  # fmt: skip
    for name in ("users", "items", "edges"):
        parser.add_argument(f"--{name}", type=count, metavar="N", help="instead of a dataset's")


def count(text: str) -> int:
    try:
        value = int(float(text))
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, such as 8 or 2e9")
    return value


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    plan = planned(args, config)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        _print(plan, config)
    refuse_what_does_not_fit(args, plan)


def planned(args: argparse.Namespace, config: Config) -> "Plan":
    """The plan for the cluster that the options describe.

    Raises:
        UserError: nothing is known of the dataset.
    """
    from cnsdiff_dist.cluster.cost_model import Cluster, make_plan

    cluster = Cluster(args.device, args.nodes, args.gpus_per_node)
    base = _base_bytes(config)  # before the sampling of blocks leaves its own behind
    return make_plan(config, cluster, _sizes(args, config, cluster), base)


def refuse_what_does_not_fit(args: argparse.Namespace, plan: "Plan") -> None:
    """
    Raises:
        UserError: so is this plan; what to change.
    """
    if not plan.fits:
        where = " and ".join(plan.over)
        raise UserError(
            f"{args.config}: does not fit the {where} memory of {args.nodes} x "
            f"{args.gpus_per_node} {args.device}; try {'; or '.join(plan.changes)}"
        )


def _sizes(args: argparse.Namespace, config: Config, cluster: "Cluster") -> "Sizes":
    from cnsdiff_dist.cluster.cost_model import bounded_sizes, sizes_of
    from cnsdiff_dist.data.dataset import load_manifest
    from cnsdiff_dist.data.graph import open_graph

    given = [args.users, args.items, args.edges]
    if all(given):
        return bounded_sizes(config, cluster, *given)
    if any(given):
        raise UserError("--users, --items and --edges go together: give all three or none")
    if not config.data.url:
        raise UserError(f"{args.config}: data.url is not set; add it, or --users --items --edges")
    manifest = load_manifest(config.data.url)
    return sizes_of(config, cluster, open_graph(config.data.url, manifest, verify=False))


def _base_bytes(config: Config) -> int:
    """What a training process holds before it has a dataset: this one, after a step of nothing
    (libraries import much of themselves when they are first used)."""
    import torch

    import cnsdiff_dist.training.loop  # noqa: F401
    from cnsdiff_dist.cluster.cost_model import has_network
    from cnsdiff_dist.distributed.dense_engine import DenseEngine
    from cnsdiff_dist.distributed.sharded_tables import ShardedTables
    from cnsdiff_dist.distributed.world import join_world

    world = join_world(config.run.timeout_seconds)
    tables = ShardedTables(1, 1, 4, Tables(), 1, 0, world)  # the config's may need a GPU
    network = torch.nn.Linear(4, 4) if has_network(config) else None
    engine = DenseEngine(network, config.generator, 1)
    first = torch.zeros(1, dtype=torch.int64, device=world.device)
    rows = tables.lookup(first, first)
    engine.backward((engine.network(rows) if engine.network else rows).sum())
    engine.step()
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _print(plan: "Plan", config: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    cluster, sizes, link = plan.cluster, plan.sizes, plan.cluster.spec.link
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    print(
        f"{sizes.users:,} users, {sizes.items:,} items, {sizes.edges:,} edges; a rank's step: "
        f"{sizes.block_nodes:,} distinct rows, {sizes.block_edges:,} edges"
    )
    shards = Table("table", "sharding", "kernel", "rows x columns of a shard", "ranks")
    for table in plan.tables:
        _, rows, columns = table.shards[0]
        ranks = len({rank for rank, *_ in table.shards})
        shape = f"{rows:,} x {columns}"
        shards.add_row(table.name, table.sharding, table.kernel, shape, str(ranks))
    if plan.tables:
        console.print(shards)
    memory = Table("memory of a rank", "GB", title=None)
    sides = (("GPU", plan.device, link.device_bytes), ("host", plan.host, link.host_bytes))
    for side, parts, room in sides:
        for name, value in parts.items():
            memory.add_row(f"{side}: {name}", f"{value / 1e9:,.3f}")
        if parts:
            total = f"{sum(parts.values()) / 1e9:,.3f} of {room / 1e9:,.1f}"
            memory.add_row(f"{side}: together", total, end_section=True)
    console.print(memory)
    step = Table("step of a rank", "bytes sent", "ms at least")
    for name, value in plan.sent.items():
        step.add_row(name, f"{value:,}", "")
    for name, seconds in plan.seconds.items():
        step.add_row(name, "", f"{1e3 * seconds:.2f}")
    total_s = sum(plan.seconds.values())
    step.add_row("together", "", f"{1e3 * total_s:.2f}")
    console.print(step)
    print(
        f"{config.train.batch / total_s:,.0f} samples/s at most if nothing overlaps, with "
        f"{link.memory / 1e9:,.0f} GB/s of memory, {link.within_node / 1e9:,.4g} GB/s within a "
        f"node and {link.between_nodes / 1e9:,.4g} GB/s between nodes per rank, one way; "
        f"{_assumed(cluster)}"
    )
    if plan.fits and plan.changes:
        print(f"it fits; training also needs {', '.join(plan.changes)}")
    elif plan.fits:
        print("it fits")


def _assumed(cluster: "Cluster") -> str:
    if cluster.cuda:
        return "makers' figures, not measured here"
    return "one core a rank as in docs/benchmarks.md, the network between nodes a guess"
