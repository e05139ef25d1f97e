"""``cnsdiff launch k8s``: print a run as Kubernetes manifests."""

import argparse
import math
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cnsdiff_dist import storage
from cnsdiff_dist.cluster import manifests
from cnsdiff_dist.commands import plan as plan_command
from cnsdiff_dist.commands.options import add_command, add_config
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers
    from cnsdiff_dist.config import Config

_EPILOG = """\
examples:
  cnsdiff launch k8s configs/demo.yaml data.url=s3://bucket/data run.dir=s3://bucket/runs/first \\
      data.streams=16 --image registry.example/cnsdiff:0.1.0 --nodes 2 --gpus-per-node 8 > run.yaml
  cnsdiff launch k8s configs/demo.yaml data.url=/mnt/data run.dir=/mnt/runs/first \\
      --image registry.example/cnsdiff:0.1.0-cpu --nodes 2 --device cpu \\
      --volume cnsdiff=/mnt --memory 8 > run.yaml
  cnsdiff launch k8s configs/demo.yaml --kind nightly --schedule '0 3 * * *' --memory 512 \\
      --image registry.example/cnsdiff:0.1.0 --gpus-per-node 8 \\
      --identity eks.amazonaws.com/role-arn=arn:.. \\
      --env LOGS='s3://bucket/logs/*.parquet' --env NIGHTLY=s3://bucket/nightly > nightly.yaml
  kubectl apply --dry-run=server -f run.yaml && kubectl apply -f run.yaml
"""
# By whether the ranks have GPUs. The least host memory of a rank with a GPU is a guess: what CUDA
# itself takes was not measured.
_LEAST_GIB_OF_RANK = {True: 8, False: 2}
_SHM_GIB = {True: 16, False: 1}  # as in launch/k8s; it counts as memory of the pod
_MARGIN = 1.25  # over the memory that `cnsdiff plan` counts, for what it does not count
_SECRETS = re.compile("SECRET|PASSWORD|TOKEN|CREDENTIAL|CONNECTION_STRING|_KEY|_SAS")


def register(subparsers: "Subparsers") -> None:
    parser = subparsers.add_parser(
        "launch",
        help="print the manifests of a run on a cluster",
        description="Print a run's Kubernetes manifests. Nothing is applied.",
    )
    targets = parser.add_subparsers(metavar="TARGET", required=True)
    k8s = add_command(
        targets,
        "k8s",
        run,
        help="Kubernetes: a Job, JobSet, Kubeflow TrainJob or nightly CronJob",
        description="Print the objects of a run as YAML: launch/k8s with this run's config,\n"
        "image and sizes. Memory is what `cnsdiff plan` counts, or --memory. Credentials come\n"
        "from the pods' identity (--identity) or a Secret that is there already (--secret).",
        epilog=_EPILOG,
    )
    add_config(k8s, overrides="override a config key")
    k8s.add_argument("--image", required=True, help="that every node can pull")
    k8s.add_argument("--kind", choices=manifests.KINDS, default="job", help="default: job")
    k8s.add_argument("--name", help="of the run in the cluster; default: CONFIG's name")
    k8s.add_argument("--namespace", default="", help="default: that of your kubectl")
    k8s.add_argument("--schedule", default="", help="of --kind nightly, as cron writes it")
    _add_sizes(k8s)
    _add_surroundings(k8s)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("sizes")
    plan_command.add_cluster(options)
    count = plan_command.count
    options.add_argument("--memory", type=count, metavar="GIB", help="of a pod, instead of a plan")
    options.add_argument(
        "--cpus-per-rank", type=count, metavar="N", help="default: 8 for a GPU, 2 without"
    )


def _add_surroundings(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group("surroundings; each may be given several times")
    annotation = "annotation of the service account, e.g. eks.amazonaws.com/role-arn=arn:.."
    pairs = (
        ("--env", "NAME=VALUE", "a variable, such as AWS_REGION; no secrets"),
        ("--volume", "CLAIM=PATH", "mount a PersistentVolumeClaim"),
        ("--identity", "KEY=VALUE", annotation),
    )
    for flag, metavar, text in pairs:
        options.add_argument(
            flag, action="append", default=[], type=_pair, metavar=metavar, help=text
        )
    options.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a Secret there, whose keys become variables",
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def run(args: argparse.Namespace) -> None:
    from cnsdiff_dist.config import dump_config, load_config

    config = load_config(args.config, args.overrides)
    volumes = {path: claim for claim, path in args.volume}
    env = dict(args.env)
    _refuse_unreachable_places(args, config, env, list(volumes))
    _refuse_plain_secrets(env)
    _refuse_uneven_streams(args, config)
    gpus, ranks = args.device != "cpu", args.gpus_per_node
    launch = manifests.Launch(
        name=args.name or Path(args.config).stem.lower().replace("_", "-"),
        image=args.image,
        config=dump_config(config),
        kind=args.kind,
        namespace=args.namespace,
        nodes=args.nodes,
        ranks=ranks,
        gpus=gpus,
        cpus=ranks * (args.cpus_per_rank or (8 if gpus else 2)),
        memory_gib=args.memory or _planned_gib(args, config) + _SHM_GIB[gpus],
        grace_seconds=config.run.grace_seconds,
        env=env,
        secrets=tuple(args.secret),
        volumes=volumes,
        identity=dict(args.identity),
        schedule=args.schedule,
    )
    sys.stdout.write(manifests.to_yaml(manifests.render(launch)))


def _refuse_unreachable_places(
    args: argparse.Namespace, config: "Config", env: dict[str, str], mounts: list[str]
) -> None:
    """
    Raises:
        UserError: a URL that the run needs is not set, holds a secret, or is out of a pod's reach.
    """
    places = {"data.url": config.data.url, "run.dir": config.run.dir}
    for url in (*places.values(), *env.values()):
        storage.refuse_secrets(url)
    if args.kind == "nightly":
        places = {name: env.get(name, "") for name in ("LOGS", "NIGHTLY")}
    for name, url in places.items():
        how = f"--env {name}=URL" if args.kind == "nightly" else f"add {name}=URL"
        if not url:
            raise UserError(f"{args.config}: {name} is not set; {how}")
        mounted = any(PurePosixPath(url).is_relative_to(mount) for mount in mounts)
        if storage.is_local(url) and not mounted:
            raise UserError(
                f"{name}={url}: pods do not see this machine's files; give a URL, or a path in a "
                "--volume CLAIM=PATH"
            )


def _refuse_plain_secrets(env: dict[str, str]) -> None:
    """
    Raises:
        UserError: a variable's name says that it holds a secret.
    """
    for name in env:
        if _SECRETS.search(name.upper()) and not name.upper().endswith("_FILE"):
            raise UserError(f"--env {name}: looks like a secret; put it in a Secret, --secret NAME")


def _refuse_uneven_streams(args: argparse.Namespace, config: "Config") -> None:
    """
    Raises:
        UserError: the world size does not divide the streams.
    """
    ranks = args.nodes * args.gpus_per_node
    if config.data.streams % ranks:
        raise UserError(
            f"a world of {ranks} ranks does not divide data.streams={config.data.streams}; "
            "choose other --nodes and --gpus-per-node, or data.streams"
        )


def _planned_gib(args: argparse.Namespace, config: "Config") -> int:
    """The host memory of a node's ranks, with a margin.

    Raises:
        UserError: they do not fit, or nothing is known of the dataset.
    """
    estimate = plan_command.estimated(args, config)
    if args.device != "cpu":  # with CPUs `plan` knows the memory of this machine, not the node's
        plan_command.refuse_what_does_not_fit(args, estimate)
    host = sum(estimate.host.values()) * args.gpus_per_node
    least = _LEAST_GIB_OF_RANK[args.device != "cpu"] * args.gpus_per_node
    return max(least, math.ceil(_MARGIN * host / 2**30))
