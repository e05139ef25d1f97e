"""``cnsdiff train``: train a run, or go on with it."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cnsdiff_dist import logs, storage
from cnsdiff_dist.config import Config, describe_config, load_config
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.data.schema import Manifest
    from cnsdiff_dist.distributed.world import World
    from cnsdiff_dist.runs.prometheus import Exporter
    from cnsdiff_dist.training.preemption import Preemption

_EPILOG = """\
examples:
  cnsdiff train configs/demo.yaml
  cnsdiff train configs/food.yaml run.seed=1 run.dir=runs/food-1
  cnsdiff train configs/food.yaml negatives.kind=uniform run.dir=runs/food-bpr
  PET_NPROC_PER_NODE=8 launch/torchrun.sh train configs/food.yaml

The same command again continues a run from its last checkpoint.
"""


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Train on a prepared dataset. Alone, or on every rank under torchrun.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override, e.g. train.epochs=3"
    )
    parser.add_argument("--help-config", action="store_true", help="list every config key")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.help_config:
        _print_keys()
        return
    if not args.config:
        raise UserError("name a config file, e.g. `cnsdiff train configs/demo.yaml`")
    config = load_config(args.config, args.overrides)
    if not config.run.dir:
        name = f"runs/{Path(args.config).stem}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": name})})
    if not config.data.url:
        raise UserError(f"{args.config}: data.url is not set; add data.url=DATASET")
    for url in (config.data.url, config.run.dir):
        storage.refuse_secrets(url)
    if logs.as_json():
        logs.take_over()
    train(config, preemptible=True)


def train(config: Config, preemptible: bool = False) -> None:
    """Train one run to its end. Collective.

    Raises:
        TryAgain: ``preemptible``, and a rank got SIGTERM; or a peer was lost.
    """
    # Imported here so that `cnsdiff --help` does not wait for torch.
    from cnsdiff_dist.data.dataset import load_manifest
    from cnsdiff_dist.distributed.heartbeat import Peers
    from cnsdiff_dist.distributed.world import join_world
    from cnsdiff_dist.runs.directory import check_run
    from cnsdiff_dist.training.preemption import Preemption

    logs.context.run = storage.display(config.run.dir)
    manifest = load_manifest(config.data.url)
    check_run(config, manifest)
    world = join_world(config.run.timeout_seconds)
    # Both places have answered: from here on a silence may pass.
    with (
        storage.patient(config.run.retry_seconds),
        Peers(world, config.run.timeout_seconds) as peers,
        # Around the naming of lost peers: torchrun, which sees one die, sends the others SIGTERM.
        Preemption(config.run.grace_seconds) as preemption,
        peers.named(),
        # Before the run is claimed: a second training on this host ends here, and harms no first.
        _exporter(config, manifest, world) as exporter,
    ):
        _train(config, manifest, world, preemption, preemptible, exporter)


def _train(
    config: Config, manifest: "Manifest", world: "World",
    preemption: "Preemption", preemptible: bool, exporter: "Exporter",
) -> None:  # fmt: skip
    from cnsdiff_dist.data.graph import open_graph
    from cnsdiff_dist.runs.directory import open_run
    from cnsdiff_dist.runs.reporter import Reporter
    from cnsdiff_dist.training.loop import Trainer

    graph = open_graph(config.data.url, manifest, verify=world.local_rank == 0)
    trainer = Trainer(config, manifest, graph, world)
    open_run(config, manifest, world)
    damaged: list[str] = []
    commit = trainer.resume(damaged.append)

    start, total = trainer.progress.step, trainer.total_steps
    logs.context.step = start
    where = config.run.dir
    reporting = Reporter(where, start, total, exporter) if world.is_main else nullcontext()
    if preemptible:
        preemption.watch()
    with reporting as reporter:
        if reporter:
            reporter.say(_headline(config, manifest.name, world.size, world.device.type))
            for line in damaged:
                reporter.say(line, "warning")
            if commit:
                reporter.committed(commit)
                reporter.say(f"resumed from {storage.display(commit.url)}")
        trainer.fit(reporter, preemption.asked.is_set)
        memory = world.peak_memory()
        if reporter:
            reporter.publish()
            best = trainer.progress
            reporter.say(
                f"finished: best {config.train.select_split} {config.train.select_metric} "
                f"{best.best:.4f} at step {best.best_step}; at most {memory:.2f} GiB a rank; "
                f"run in {storage.display(config.run.dir)}"
            )


def _exporter(config: Config, manifest: "Manifest", world: "World") -> "Exporter":
    from cnsdiff_dist.runs.directory import versions
    from cnsdiff_dist.runs.prometheus import Exporter

    return Exporter(
        config.run.metrics_port if world.is_main else 0,
        run=storage.display(config.run.dir),
        dataset=manifest.name,
        negatives=config.negatives.kind,
        world_size=str(world.size),
        version=versions().get("cnsdiff_dist", ""),
    )


def _headline(config: Config, dataset: str, ranks: int, device: str) -> str:
    layers, dim = config.model.layers, config.model.dim
    return (
        f"{config.negatives.kind} negatives, LightGCN L={layers} D={dim}, dataset {dataset}, "
        f"batch {config.train.batch}, {ranks} {device} rank{'s' if ranks > 1 else ''}"
    )


def _print_keys() -> None:
    for section, key, default, description in describe_config():
        print(f"{section + '.' + key:34} {default!s:26} {description}".rstrip())
