"""``cnsdiff launch k8s``: a run as Kubernetes manifests."""

import argparse
import math
import re
import sys
from pathlib import Path, PurePosixPath

from cnsdiff_dist import storage
from cnsdiff_dist.cluster import manifests
from cnsdiff_dist.commands import plan as planning_command
from cnsdiff_dist.config import Config, dump_config, load_config
from cnsdiff_dist.errors import UserError

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
_SPARE = 1.25  # of what a plan counts, for what it does not
_LEAST_GIB = {True: 8, False: 2}  # of a rank with a GPU, a guess: CUDA's own was not measured
_SECRETS = re.compile("SECRET|PASSWORD|TOKEN|CREDENTIAL|CONNECTION_STRING|_KEY|_SAS")
_SHM_GIB = {True: 16, False: 1}  # as in launch/k8s; it counts as memory of the pod


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "launch",
        help="print the manifests of a run on a cluster",
        description="Print a run's Kubernetes manifests. Nothing is applied.",
    )
    targets = parser.add_subparsers(metavar="TARGET", required=True)
    k8s = targets.add_parser(
        "k8s",
        help="Kubernetes: a Job, JobSet, Kubeflow TrainJob or nightly CronJob",
        description="Print the objects of a run as YAML: launch/k8s with this run's config,\n"
        "image and sizes. Memory is what `cnsdiff plan` counts, or --memory. Credentials come\n"
        "from the pods' identity (--identity) or a Secret that is there already (--secret).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    k8s.add_argument("config", metavar="CONFIG", help="YAML file; see configs/")
    k8s.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a config key")
    k8s.add_argument("--image", required=True, help="that every node can pull")
    k8s.add_argument("--kind", choices=manifests.KINDS, default="job", help="default: job")
    k8s.add_argument("--name", help="of the run in the cluster; default: CONFIG's name")
    k8s.add_argument("--namespace", default="", help="default: that of your kubectl")
    k8s.add_argument("--schedule", default="", help="of --kind nightly, as cron writes it")
    _add_sizes(k8s)
    _add_surroundings(k8s)
    k8s.set_defaults(run=run)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes")
    planning_command.add_cluster(group)
    group.add_argument(
        "--memory", type=planning_command.count, metavar="GIB", help="of a pod, instead of a plan"
    )
    group.add_argument(
        "--cpus-per-rank", type=planning_command.count, metavar="N",
        help="default: 8 for a GPU, 2 without",
    )  # fmt: skip


def _add_surroundings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("surroundings; each may be given several times")
    pairs = (
        ("--env", "NAME=VALUE", "a variable, such as AWS_REGION; no secrets"),
        ("--volume", "CLAIM=PATH", "mount a PersistentVolumeClaim"),
        (
            "--identity", "KEY=VALUE",
            "annotation of the service account, e.g. eks.amazonaws.com/role-arn=arn:..",
        ),
    )  # fmt: skip
    for flag, metavar, text in pairs:
        group.add_argument(
            flag, action="append", default=[], type=_pair, metavar=metavar, help=text
        )
    group.add_argument(
        "--secret", action="append", default=[], metavar="NAME",
        help="a Secret there, whose keys become variables",
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    volumes = {path: claim for claim, path in args.volume}
    env = dict(args.env)
    _refuse_what_pods_lack(args, config, env, list(volumes))
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


def _refuse_what_pods_lack(
    args: argparse.Namespace, config: Config, env: dict[str, str], mounts: list[str]
) -> None:
    """
    Raises:
        UserError: the run would fail on the cluster, and here is why.
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
        if storage.is_local(url) and not any(
            PurePosixPath(url).is_relative_to(mount) for mount in mounts
        ):
            raise UserError(
                f"{name}={url}: pods do not see this machine's files; give a URL, or a path in a "
                "--volume CLAIM=PATH"
            )
    for name in env:
        if _SECRETS.search(name.upper()) and not name.upper().endswith("_FILE"):
            raise UserError(f"--env {name}: looks like a secret; put it in a Secret, --secret NAME")
    ranks = args.nodes * args.gpus_per_node
    if config.data.streams % ranks:
        raise UserError(
            f"a world of {ranks} ranks does not divide data.streams={config.data.streams}; "
            "choose other --nodes and --gpus-per-node, or data.streams"
        )


def _planned_gib(args: argparse.Namespace, config: Config) -> int:
    """Memory of a node's ranks on the host.

    Raises:
        UserError: they do not fit, or nothing is known of the dataset.
    """
    plan = planning_command.planned(args, config)
    if args.device != "cpu":  # that node's memory is not this one's
        planning_command.refuse_what_does_not_fit(args, plan)
    host = sum(plan.host.values()) * args.gpus_per_node
    least = _LEAST_GIB[args.device != "cpu"] * args.gpus_per_node
    return max(least, math.ceil(_SPARE * host / 2**30))
