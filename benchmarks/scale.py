"""Step time and memory against the number of nodes, on synthetic power-law graphs.

    python -m benchmarks.scale [--nodes 100000 1000000 10000000] [--batch 64 1024] [--root data]

10 edges a node, fan-out 10/5; one process and one thread per size and batch, taking turns. The
datasets are made by `cnsdiff prepare` and kept (10 million nodes: 8 minutes, 1.7 GB). The time of
a step is what the training loop waits for; the sampling of its block, which runs ahead of it, is
reported separately.

A small graph makes a small block: once the sample of a batch covers much of the graph, its
neighbours coincide. So the first batch is small enough for the smallest graph, and the growth at
the other batches shows what coinciding saves there.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch

from benchmarks.graphs import power_law_dataset, sampled_trainer
from benchmarks.machine import machine, report
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.data.dataset import load_manifest

CONSTANT_GIB = 0.8
"""Of the memory bound: the process with its libraries (0.45) and the arrays of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3, help="the quickest of these counts")
    parser.add_argument("--root", default="data", help="where the datasets are kept")
    parser.add_argument("--one", nargs=2, metavar=("DATA", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args.one[0], int(args.one[1]), args.steps)))
        return
    data = {nodes: power_law_dataset(nodes, args.root) for nodes in args.nodes}
    rounds: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for _, nodes, batch in itertools.product(range(args.rounds), args.nodes, args.batch):
        words = ["--one", data[nodes], str(batch), "--steps", str(args.steps)]
        rounds.setdefault((nodes, batch), []).append(_measure_apart(words))
    found = [
        {"nodes": nodes, "batch": batch, **min(runs, key=lambda run: float(run["step_ms"]))}
        for (nodes, batch), runs in rounds.items()
    ]
    growth = {
        str(batch): _growth([run for run in found if run["batch"] == batch]) for batch in args.batch
    }
    result = {"benchmark": "scale", "machine": machine(), "fan_out": [10, 5]}
    report({**result, "runs": found, "growth": growth})


def _measure_apart(words: list[str]) -> dict[str, Any]:
    """Measure in a process of its own, since the peak of memory is that of a process."""
    command = [sys.executable, "-m", "benchmarks.scale", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _growth(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The largest graph's values over the smallest graph's."""
    first, last = runs[0], runs[-1]
    return {name: round(last[name] / first[name], 3) for name in ("step_ms", "block_rows")}


def _measure(data: str, batch: int, steps: int) -> dict[str, Any]:
    quiet()
    torch.set_num_threads(1)
    trainer = sampled_trainer(data, tempfile.mkdtemp(), f"train.batch={batch}")
    config, world, manifest = trainer.config, trainer.world, load_manifest(data)
    sampling, stepping, rows = [], [], []
    for taken in itertools.islice(trainer.stream.batches(0), steps):
        started = time.perf_counter()
        inputs = trainer.loader.prepare(taken)
        sampled = time.perf_counter()
        trainer.take_step(inputs)
        stepping.append(time.perf_counter() - sampled)
        sampling.append(sampled - started)
        rows.append(len(inputs.block.users) + len(inputs.block.items))
    warm = steps // 3  # the first steps touch tables and graph for the first time
    table = 4 * (config.model.dim + 1) * (manifest.users + manifest.items)
    graph_bytes = sum(blob.bytes for blob in manifest.graph.blobs)
    bound = 1.15 * table / world.size + graph_bytes
    return {
        "edges": manifest.graph.edges,
        "step_ms": round(1e3 * float(np.median(stepping[warm:])), 2),
        "sampling_ms": round(1e3 * float(np.median(sampling[warm:])), 2),
        "block_rows": round(float(np.mean(rows))),
        "peak_memory_gib": round(world.peak_memory(), 3),
        "bound_gib": round(bound / 2**30 + CONSTANT_GIB, 3),
    }


if __name__ == "__main__":
    main()
