"""Weak scaling: samples a second at 1 and 2 ranks with the same rows per rank.

    python -m benchmarks.weak --data data/power-law-1000000 [--rows 512] [KEY=VALUE ...]

Each rank has one thread and a core of its own, its loader threads included. Runs alternate.
``efficiency`` is the rate per rank over the rate of one rank alone on the machine.
``against_independent`` compares with as many single-rank jobs side by side, which share the
machine's memory bandwidth as the ranks do but never communicate.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.graphs import sampled_trainer
from benchmarks.machine import machine, report
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.distributed.world import join_world, leave_world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=512, help="of a rank and step")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    if "RANK" in os.environ:
        _work(args)
        return
    layouts = {"alone": (1, 1), "independent": (args.ranks, 1), "together": (1, args.ranks)}
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    for _, (name, layout) in itertools.product(range(args.rounds), layouts.items()):
        rates[name].append(_launch(*layout))
    median = {name: statistics.median(values) for name, values in rates.items()}
    report(
        {
            "benchmark": "weak scaling",
            "machine": machine(ranks=args.ranks),
            "data": args.data,
            "rows_per_rank": args.rows,
            "samples_per_second": {name: round(rate) for name, rate in median.items()},
            "efficiency": round(median["together"] / args.ranks / median["alone"], 3),
            "against_independent": round(median["together"] / median["independent"], 3),
        }
    )


def _launch(jobs: int, ranks: int) -> float:
    """Samples a second of ``jobs`` jobs together, of ``ranks`` ranks each, started at once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", str(ranks), "-m", "benchmarks.weak", *sys.argv[1:]]
    running = []
    for job in range(jobs):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "FIRST_CORE": str(job * ranks)}
        command = [*launcher, *words]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
    outputs = [job.communicate()[0] for job in running]
    return sum(float(json.loads(output.splitlines()[-1])["rate"]) for output in outputs)


def _work(args: argparse.Namespace) -> None:
    """Train as one rank; rank 0 prints the samples a second of its job."""
    core = int(os.environ["FIRST_CORE"]) + int(os.environ["LOCAL_RANK"])
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})
    quiet()
    torch.set_num_threads(1)
    world = join_world(120)
    sizes = [f"train.batch={args.rows * world.size}", f"data.streams={4 * world.size}"]
    trainer = sampled_trainer(args.data, tempfile.mkdtemp(), *sizes, *args.overrides)
    steps = trainer.loader.steps(0)
    for inputs in itertools.islice(steps, args.steps // 3):
        trainer.take_step(inputs)
    world.barrier()
    started = time.perf_counter()
    for inputs in itertools.islice(steps, args.steps):
        trainer.take_step(inputs)
    world.barrier()
    rate = args.steps * trainer.config.train.batch / (time.perf_counter() - started)
    if world.is_main:
        print(json.dumps({"rate": rate}), flush=True)
    leave_world()


if __name__ == "__main__":
    main()
