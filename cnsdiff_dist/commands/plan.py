"""``cnsdiff plan``: does this config fit that cluster, and what will a step cost?"""

import argparse
import json
from typing import TYPE_CHECKING

from cnsdiff_dist.commands.options import add_command, add_config
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from cnsdiff_dist.cluster.cost_model import Estimate
    from cnsdiff_dist.cluster.hardware import Cluster
    from cnsdiff_dist.cluster.step_sizes import Sizes
    from cnsdiff_dist.commands.options import Subparsers
    from cnsdiff_dist.config import Config

_EPILOG = """\
examples:
  cnsdiff plan configs/demo.yaml --gpus-per-node 2 --device cpu
  cnsdiff plan configs/demo.yaml model.dim=128 data.streams=32 --nodes 4 --gpus-per-node 8 \\
      --device h100 --users 2e9 --items 1e8 --edges 2e10
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "plan",
        run,
        help="say whether a config fits a cluster, and what a step costs there",
        description="Place the tables with TorchRec's planner, count the bytes of the rest, and "
        "say what to change if they do not fit. Offline: no GPU is needed. With the config's "
        "dataset the blocks of a few steps are really sampled; with --users, --items and --edges "
        "no dataset is needed. Exit code 2 if it does not fit.",
        epilog=_EPILOG,
    )
    add_config(parser, overrides="override a config key")
    add_cluster(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_cluster(parser: "argparse._ActionsContainer") -> None:
    """The options that say how large the cluster and the data are."""
    default = "default: %(default)s"
    ranks, devices = f"ranks of a node, also on CPUs; {default}", ("h100", "h200", "a100", "cpu")
    parser.add_argument("--nodes", type=count, default=1, help=default)
    parser.add_argument("--gpus-per-node", type=count, default=1, metavar="G", help=ranks)
    parser.add_argument("--device", choices=devices, default="h100", help=default)
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
    from cnsdiff_dist.config import load_config

    config = load_config(args.config, args.overrides)
    found = estimated(args, config)
    if args.json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _print(found, config)
    refuse_what_does_not_fit(args, found)


def estimated(args: argparse.Namespace, config: "Config") -> "Estimate":
    """What the config needs of the cluster that the options describe.

    Raises:
        UserError: nothing is known of the dataset.
    """
    from cnsdiff_dist.cluster.base_memory import process_bytes
    from cnsdiff_dist.cluster.cost_model import Job
    from cnsdiff_dist.cluster.hardware import Cluster
    from cnsdiff_dist.cluster.remedies import estimate_with_remedies

    cluster = Cluster(args.device, args.nodes, args.gpus_per_node)
    base = process_bytes(config)  # before the sampling of blocks leaves its own memory behind
    return estimate_with_remedies(Job(config, cluster, _sizes(args, config, cluster)), base)


def refuse_what_does_not_fit(args: argparse.Namespace, found: "Estimate") -> None:
    """
    Raises:
        UserError: the job does not fit; the error says what to change.
    """
    if not found.fits:
        where = " and ".join(found.over)
        raise UserError(
            f"{args.config}: does not fit the {where} memory of {args.nodes} x "
            f"{args.gpus_per_node} {args.device}; try {'; or '.join(found.changes)}"
        )


def _sizes(args: argparse.Namespace, config: "Config", cluster: "Cluster") -> "Sizes":
    from cnsdiff_dist.cluster.step_sizes import bounded_sizes, measured_sizes
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
    return measured_sizes(config, cluster, open_graph(config.data.url, manifest, verify=False))


def _print(found: "Estimate", config: "Config") -> None:
    from rich.console import Console

    sizes = found.sizes
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    print(
        f"{sizes.users:,} users, {sizes.items:,} items, {sizes.edges:,} edges; a rank's step: "
        f"{sizes.block_nodes:,} distinct rows, {sizes.block_edges:,} edges"
    )
    for table in (_shard_table(found), _memory_table(found), _step_table(found)):
        if table.row_count:
            console.print(table)
    print(_pace(found, config))
    if found.fits and found.changes:
        print(f"it fits; training also needs {', '.join(found.changes)}")
    elif found.fits:
        print("it fits")


def _shard_table(found: "Estimate") -> "Table":
    from rich.table import Table

    rows = Table("table", "sharding", "kernel", "rows x columns of a shard", "ranks")
    for table in found.tables:
        _, height, columns = table.shards[0]
        ranks = len({rank for rank, *_ in table.shards})
        rows.add_row(
            table.name, table.sharding, table.kernel, f"{height:,} x {columns}", str(ranks)
        )
    return rows


def _memory_table(found: "Estimate") -> "Table":
    from rich.table import Table

    link, rows = found.cluster.spec.link, Table("memory of a rank", "GB")
    sides = (("GPU", found.device, link.device_bytes), ("host", found.host, link.host_bytes))
    for side, parts, room in sides:
        for name, value in parts.items():
            rows.add_row(f"{side}: {name}", f"{value / 1e9:,.3f}")
        if parts:
            total = f"{sum(parts.values()) / 1e9:,.3f} of {room / 1e9:,.1f}"
            rows.add_row(f"{side}: together", total, end_section=True)
    return rows


def _step_table(found: "Estimate") -> "Table":
    from rich.table import Table

    rows = Table("step of a rank", "bytes sent", "ms at least")
    for name, value in found.sent.items():
        rows.add_row(name, f"{value:,}", "")
    for name, seconds in found.seconds.items():
        rows.add_row(name, "", f"{1e3 * seconds:.2f}")
    rows.add_row("together", "", f"{1e3 * sum(found.seconds.values()):.2f}")
    return rows


def _pace(found: "Estimate", config: "Config") -> str:
    link = found.cluster.spec.link
    return (
        f"{config.train.batch / sum(found.seconds.values()):,.0f} samples/s at most if nothing "
        f"overlaps, with {link.memory / 1e9:,.0f} GB/s of memory, {link.within_node / 1e9:,.4g} "
        f"GB/s within a node and {link.between_nodes / 1e9:,.4g} GB/s between nodes per rank, one "
        f"way; {_assumed(found.cluster)}"
    )


def _assumed(cluster: "Cluster") -> str:
    if cluster.cuda:
        return "makers' figures, not measured here"
    return "one core a rank as in docs/benchmarks.md, the network between nodes a guess"
