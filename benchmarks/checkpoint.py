"""What a checkpoint every 100 steps costs the steps, and how long it is written behind them.

    python -m benchmarks.checkpoint [--nodes 1000000] [--every 100] [--root data]

A synthetic power-law graph and the demo config at fan-out 10/5; one process, one thread. Rounds
of steps without a checkpoint alternate with rounds that begin with one. It is made as in training:
the check for finite parameters and the copy hold up the steps, the write (hash, fsync, commit)
runs behind them. The floor of the copy is the checkpoint's bytes read and written once.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.graphs import power_law_dataset, sampled_trainer
from benchmarks.machine import machine, report
from cnsdiff_dist.checkpoint.manager import Costs
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.training.finite import refuse_non_finite
from cnsdiff_dist.training.loader import StepInputs
from cnsdiff_dist.training.loop import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--root", default="data", help="where the dataset is kept")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    data = power_law_dataset(args.nodes, args.root)
    with tempfile.TemporaryDirectory(dir=args.root) as run:
        trainer = sampled_trainer(data, run, f"train.batch={args.batch}")
        report({"benchmark": "checkpoint", "machine": machine(), **_measure(trainer, args)})


def _measure(trainer: Trainer, args: argparse.Namespace) -> dict[str, object]:
    feed = itertools.chain.from_iterable(trainer.loader.steps(epoch) for epoch in range(1000))
    _round(trainer, feed, args.every // 2, save=False)  # first touch of tables and graph is slow
    _save(trainer)
    trainer.checkpoints.wait()
    trainer.checkpoints.costs = costs = Costs()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * args.rounds):
        save = bool((turn + 1) // 2 % 2)  # without, with, with, without: drift hits both alike
        seconds[save].append(_round(trainer, feed, args.every, save))
    plain, saving = (float(np.median(seconds[key])) for key in (False, True))
    return {
        "steps": args.every,
        "bytes": costs.bytes // costs.count,
        "step_ms": round(1e3 * plain / args.every, 2),
        "steps_waited_ms": round(1e3 * costs.waited / costs.count, 1),
        "written_behind_ms": round(1e3 * costs.written / costs.count, 1),
        "cost": round(saving / plain - 1, 4),
    }


def _round(trainer: Trainer, feed: Iterator[StepInputs], steps: int, save: bool) -> float:
    """Seconds of so many steps, after a checkpoint if ``save``."""
    started = time.perf_counter()
    if save:
        _save(trainer)
    for inputs in itertools.islice(feed, steps):
        trainer.step.set_learning_rates(trainer.progress.step)
        trainer.take_step(inputs)
        trainer.progress.step += 1
    seconds = time.perf_counter() - started
    trainer.checkpoints.wait()  # ended long ago, unless the steps took less time than the write
    return seconds


def _save(trainer: Trainer) -> None:
    state = trainer.step.state()
    refuse_non_finite(state, trainer.world, trainer.progress.step)
    trainer._save(state, None)


if __name__ == "__main__":
    main()
