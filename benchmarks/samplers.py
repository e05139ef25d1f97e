"""The step of every sampler against that of LightGCN-BPR with uniform negatives, side by side.

    python -m benchmarks.samplers --data data/food [KIND ...]

One process, one thread; steps take turns, so that all meet the same load.
"""

import argparse
import json
import statistics
import tempfile
import time

import torch

from cnsdiff_dist.cli import quiet
from cnsdiff_dist.config import parse_config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import open_graph
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.training.loop import Trainer

BPR = {"kind": "bpr", "similarity": "dot", "temperature": 1.0}
SOFTMAX = ("in_batch", "mixed", "cnsdiff")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared dataset with valid_iid")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("kinds", nargs="*", default=["in_batch", "dns", "mixgcf", "cnsdiff"])
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    world, manifest = join_world(60), load_manifest(args.data)
    graph = open_graph(args.data, manifest)
    trainers = {}
    for kind in ["uniform", *args.kinds]:
        tree = {
            "data": {"url": args.data}, "run": {"dir": tempfile.mkdtemp()},
            "negatives": {"kind": kind}, "objective": {} if kind in SOFTMAX else BPR,
        }  # fmt: skip
        trainers[kind] = Trainer(parse_config(tree, kind), manifest, graph, world)
    batches = list(trainers["uniform"].stream.batches(0))
    batches = [batch for batch in batches if len(batch.users) == len(batches[0].users)]
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for step in range(3 + args.steps):
        for kind, trainer in trainers.items():
            started = time.perf_counter()
            trainer.step(trainer.loader.prepare(batches[step % len(batches)]))
            seconds[kind].append(time.perf_counter() - started)
    medians = {kind: 1000 * statistics.median(values[3:]) for kind, values in seconds.items()}
    ratios = {kind: round(value / medians["uniform"], 2) for kind, value in medians.items()}
    result = {"step_ms": {k: round(v, 1) for k, v in medians.items()}, "over_uniform": ratios}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
