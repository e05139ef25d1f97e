"""``cnsdiff train``: train a run, or go on with it."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cnsdiff_dist import logs, storage
from cnsdiff_dist.commands.options import add_command, add_config
from cnsdiff_dist.errors import UserError

# Modules that import torch, which takes seconds, are imported where they are used: `cnsdiff --help`
# must not wait for it.
if TYPE_CHECKING:
    from cnsdiff_dist.commands.options import Subparsers
    from cnsdiff_dist.config import Config
    from cnsdiff_dist.data.schema import Manifest
    from cnsdiff_dist.distributed.world import World
    from cnsdiff_dist.runs.opened import OpenRun
    from cnsdiff_dist.runs.prometheus import MetricsServer
    from cnsdiff_dist.runs.reporter import Reporter
    from cnsdiff_dist.training.loop import Trainer
    from cnsdiff_dist.training.preemption import Preemption

_EPILOG = """\
examples:
  cnsdiff train configs/demo.yaml
  cnsdiff train configs/food.yaml run.seed=1 run.dir=runs/food-1
  cnsdiff train configs/food.yaml negatives.kind=uniform run.dir=runs/food-bpr
  PET_NPROC_PER_NODE=8 launch/torchrun.sh train configs/food.yaml

The same command again continues a run from its last checkpoint.
"""


def register(subparsers: "Subparsers") -> None:
    parser = add_command(
        subparsers,
        "train",
        run,
        help="train a model, or go on with a run",
        description="Train on a prepared dataset. Alone, or on every rank under torchrun.",
        epilog=_EPILOG,
    )
    add_config(parser, nargs="?", overrides="override, e.g. train.epochs=3")
    parser.add_argument("--help-config", action="store_true", help="list every config key")


def run(args: argparse.Namespace) -> None:
    if args.help_config:
        _print_keys()
        return
    if not args.config:
        raise UserError("name a config file, e.g. `cnsdiff train configs/demo.yaml`")
    config = _load_config(args.config, args.overrides)
    if logs.as_json():
        logs.take_over()
    train(config, preemptible=True)


def _load_config(path: str, overrides: list[str]) -> "Config":
    """The config with a run directory, by default one named like the config file.

    Raises:
        UserError: it is wrong, names no dataset, or holds a secret.
    """
    from cnsdiff_dist.config import load_config

    config = load_config(path, overrides)
    if not config.run.dir:
        name = f"runs/{Path(path).stem}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": name})})
    if not config.data.url:
        raise UserError(f"{path}: data.url is not set; add data.url=DATASET")
    for url in (config.data.url, config.run.dir):
        storage.refuse_secrets(url)
    return config


def train(config: "Config", preemptible: bool = False) -> None:
    """Train one run to its end. Collective.

    Args:
        preemptible: checkpoint and stop at SIGTERM.

    Raises:
        TryAgain: a rank got SIGTERM and the run is preemptible, or a peer was lost.
        UserError: the run cannot be opened, or the training diverged.
    """
    from cnsdiff_dist.distributed.heartbeat import Heartbeat
    from cnsdiff_dist.runs.opened import open_run
    from cnsdiff_dist.training.preemption import Preemption

    logs.context.run = storage.display(config.run.dir)
    opened = open_run(config)
    with (
        # The dataset and the run directory have answered; from here on a store may be silent for
        # a while.
        storage.patient(config.run.retry_seconds),
        Heartbeat(opened.world, config.run.timeout_seconds) as heartbeat,
        # Around the naming of lost ranks: torchrun, which sees one die, sends the others SIGTERM.
        Preemption(config.run.grace_seconds) as preemption,
        heartbeat.naming_lost_ranks(),
        # Before the run is claimed: if another training on this host has the port, this one ends
        # here without having touched the run.
        _metrics_server(config, opened.manifest, opened.world) as metrics_server,
    ):
        _train(opened, preemption, preemptible, metrics_server)


def _train(
    opened: "OpenRun", preemption: "Preemption", preemptible: bool, metrics_server: "MetricsServer"
) -> None:
    from cnsdiff_dist.runs.directory import write_identity
    from cnsdiff_dist.runs.reporter import Reporter
    from cnsdiff_dist.training.loop import Trainer

    trainer = Trainer(opened)
    write_identity(opened.config, opened.manifest, opened.world)
    damaged: list[str] = []
    commit = trainer.resume(damaged.append)

    start, total = trainer.progress.step, trainer.total_steps
    logs.context.step = start
    main = opened.world.is_main
    reporting = Reporter(opened.url, start, total, metrics_server) if main else nullcontext()
    if preemptible:
        preemption.watch()
    with reporting as reporter:
        if reporter:
            reporter.say(_headline(opened))
            for line in damaged:
                reporter.say(line, "warning")
            if commit:
                reporter.committed(commit)
                reporter.say(f"resumed from {storage.display(commit.url)}")
        trainer.fit(reporter, preemption.asked.is_set)
        memory = opened.world.peak_memory()
        if reporter:
            _report_end(reporter, trainer, memory)


def _report_end(reporter: "Reporter", trainer: "Trainer", memory_gib: float) -> None:
    reporter.publish()
    config, progress = trainer.config, trainer.progress
    reporter.say(
        f"finished: best {config.train.select_split} {config.train.select_metric} "
        f"{progress.best:.4f} at step {progress.best_step}; at most {memory_gib:.2f} GiB a rank; "
        f"run in {storage.display(config.run.dir)}"
    )


def _metrics_server(config: "Config", manifest: "Manifest", world: "World") -> "MetricsServer":
    """Serves the metrics of rank 0 to Prometheus, if a port is configured."""
    from cnsdiff_dist.runs.prometheus import MetricsServer
    from cnsdiff_dist.runs.provenance import versions

    return MetricsServer(
        config.run.metrics_port if world.is_main else 0,
        run=storage.display(config.run.dir),
        dataset=manifest.name,
        negatives=config.negatives.kind,
        world_size=str(world.size),
        version=versions().get("cnsdiff_dist", ""),
    )


def _headline(opened: "OpenRun") -> str:
    config, ranks = opened.config, opened.world.size
    return (
        f"{config.negatives.kind} negatives, LightGCN L={config.model.layers} "
        f"D={config.model.dim}, dataset {opened.manifest.name}, batch {config.train.batch}, "
        f"{ranks} {opened.world.device.type} rank{'s' if ranks > 1 else ''}"
    )


def _print_keys() -> None:
    from cnsdiff_dist.config import describe_config

    for key in describe_config():
        print(f"{key.name:34} {key.default!s:26} {key.description}".rstrip())
