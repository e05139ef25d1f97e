"""The step of each sampler against that of LightGCN-BPR with uniform negatives, side by side.

    python -m benchmarks.samplers --data data/food [KIND ...]

One process, one thread. Steps take turns, so that all meet the same load of the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch

from cnsdiff_dist.cli import quiet
from cnsdiff_dist.config import parse_config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Trainer

BPR = {"kind": "bpr", "similarity": "dot", "temperature": 1.0}
SOFTMAX = ("in_batch", "mixed", "cnsdiff")
WARM_UP = 3
"""Steps that are not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared dataset with valid_iid")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("kinds", nargs="*", default=["in_batch", "dns", "mixgcf", "cnsdiff"])
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    world, manifest = join_world(60), load_manifest(args.data)
    trainers = {}
    for kind in ["uniform", *args.kinds]:
        config = parse_config(_tree(args.data, kind), kind)
        trainers[kind] = Trainer(OpenRun(config, manifest, world))
        trainers[kind].step.set_learning_rates(0)
    seconds = _alternate(trainers, args.steps)
    medians = {kind: 1000 * statistics.median(values[WARM_UP:]) for kind, values in seconds.items()}
    ratios = {kind: round(value / medians["uniform"], 2) for kind, value in medians.items()}
    result = {"step_ms": {k: round(v, 1) for k, v in medians.items()}, "over_uniform": ratios}
    print(json.dumps(result, indent=2))


def _tree(data: str, kind: str) -> dict[str, Any]:
    return {
        "data": {"url": data},
        "run": {"dir": tempfile.mkdtemp()},
        "negatives": {"kind": kind},
        "objective": {} if kind in SOFTMAX else BPR,
    }


def _alternate(trainers: dict[str, Trainer], steps: int) -> dict[str, list[float]]:
    """Seconds of each step of each trainer, on the same batches."""
    batches = list(trainers["uniform"].stream.batches(0))
    batches = [batch for batch in batches if len(batch.users) == len(batches[0].users)]
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for step in range(WARM_UP + steps):
        for kind, trainer in trainers.items():
            started = time.perf_counter()
            trainer.take_step(trainer.loader.prepare(batches[step % len(batches)]))
            seconds[kind].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
