"""A CNSDiff step and an evaluation against the published arithmetic, timed in one run.

    python -m benchmarks.step --data data/food [--config configs/food.yaml] [KEY=VALUE ...]

One process, one thread. Steps of both alternate, so that both meet the same load of the machine;
every term of the loss is on. Prints JSON with the machine, the ratio, and each part of our step
beside its floor: the bytes that it must move over the copy bandwidth, plus its operations over the
rate of matrix products, both measured here first.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from benchmarks.published import PublishedStep, published_evaluation
from cnsdiff_dist.cli import quiet
from cnsdiff_dist.config import Config, load_config
from cnsdiff_dist.data.dataset import load_manifest, read_split
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.interactions import Interactions
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Trainer

PARTS = ("candidates", "encode", "negatives", "backward", "engine step", "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--config", default="configs/food.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    words = [f"data.url={args.data}", f"run.dir={tempfile.mkdtemp()}", "loss.contrastive=0.3"]
    config = load_config(args.config, [*words, "negatives.kind=cnsdiff", *args.overrides])
    world, manifest = join_world(60), load_manifest(args.data)
    run = OpenRun(config, manifest, world)
    result = {
        "benchmark": "step",
        "machine": machine(),
        "dataset": {"name": manifest.name, "users": manifest.users, "items": manifest.items},
        "batch": config.train.batch,
        **compare_steps(run, args.steps),
        **compare_evaluations(run),
    }
    print(json.dumps(result, indent=2))


def compare_steps(run: OpenRun, steps: int) -> dict[str, Any]:
    """Median milliseconds of both steps, their ratio, and the parts of our step."""
    trainer, graph, config = Trainer(run), run.graph, run.config
    trainer.step.set_learning_rates(0)
    positives = [set(row.tolist()) for row in np.split(graph.user_items, graph.user_indptr[1:-1])]
    published = PublishedStep(positives, run.manifest.users, run.manifest.items)
    batches = [b for b in trainer.stream.batches(0) if len(b.users) == config.train.batch]
    for batch in batches[:3]:
        _step(trainer, batch)
        published.step(batch.users, batch.items)
    ours, theirs = [], []
    for step in range(steps):
        batch = batches[step % len(batches)]
        ours.append(_seconds(partial(_step, trainer, batch)))
        theirs.append(_seconds(partial(published.step, batch.users, batch.items)))
    parts = time_parts(trainer, batches[:steps])
    floors = floor_milliseconds(config, run.manifest, graph)
    return {
        "step_ms": _milliseconds(ours),
        "published_step_ms": _milliseconds(theirs),
        "step_ratio": statistics.median(t / o for t, o in zip(theirs, ours, strict=True)),
        "parts": {
            name: {"ms": round(parts[name], 2), "floor_ms": floors.get(name)} for name in PARTS
        },
    }


def _step(trainer: Trainer, batch: Batch) -> None:
    """Make the inputs, which in training the loader's threads make ahead, and do the step."""
    trainer.take_step(trainer.loader.prepare(batch))


def time_parts(trainer: Trainer, batches: list[Any]) -> dict[str, float]:
    """Median milliseconds of the calls that a step is made of."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(owner: Any, method: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def call(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args)
            finally:
                seconds[part].append(time.perf_counter() - started)

        setattr(owner, method, call)

    step = trainer.step
    timed(step.sampler, "candidates", "candidates")
    timed(step.recommender, "encode", "encode")
    timed(step.sampler, "negatives", "negatives")
    timed(step.dense, "backward", "backward")
    timed(step.dense, "step", "engine step")
    whole = [_seconds(partial(_step, trainer, batch)) for batch in batches]
    parts = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    parts["the rest"] = 1000 * statistics.median(whole) - sum(parts.values())
    return parts


def floor_milliseconds(config: Config, manifest: Manifest, graph: GraphArrays) -> dict[str, float]:
    """The least time of each part: the bytes and operations it needs, at measured rates."""
    bandwidth, rate = _copy_bandwidth(), _product_rate()
    nodes, edges = manifest.users + manifest.items, 2 * len(graph.user_items)
    batch, dim, layers = config.train.batch, config.model.dim, config.model.layers
    hidden, width = config.generator.hidden, batch // config.data.streams
    table = 4 * nodes * dim
    # A sparse product reads values, indices and both operands once, and writes once.
    propagation = layers * (8 * edges + 3 * table)
    weights = 3 * dim * hidden + hidden * hidden + hidden * dim + dim * dim
    denoise = 2 * batch * weights / rate
    contrast = 2 * batch * 2 * width * dim / rate
    forward = (2 * table + propagation) / bandwidth
    update = 5 * table / bandwidth  # gradient gathered and read, rows read and written
    probes = int(np.diff(graph.user_indptr).max()).bit_length()
    floors = {
        "candidates": 64 * batch * probes / bandwidth,  # a cache line per probe of a bisection
        "engine step": 7 * 4 * weights / bandwidth,  # Adam reads 4 and writes 3 arrays
        "encode": forward,
        "negatives": (1 + len(config.generator.levels)) * denoise + contrast,
        "backward": propagation / bandwidth + update + 2 * denoise + 2 * contrast,
    }
    return {name: round(1000 * seconds, 2) for name, seconds in floors.items()}


def compare_evaluations(run: OpenRun) -> dict[str, Any]:
    """Seconds to rank all users of test_ood, ours and user by user, on the same embeddings."""
    generator = torch.Generator().manual_seed(0)
    url, graph, shape = run.data_url, run.graph, (run.manifest.users, run.manifest.items)
    user, item = (torch.randn(n, run.config.model.dim, generator=generator) for n in shape)
    evaluator = run.evaluator("test_ood")
    test = Interactions.from_pairs(*read_split(url, run.manifest, "test_ood"), shape)
    train_csr = (graph.user_indptr, graph.user_items)
    evaluator(user, item)
    ours = min(_seconds(lambda: evaluator(user, item)) for _ in range(3))
    theirs = _seconds(
        lambda: published_evaluation(user, item, train_csr, (test.indptr, test.items), 20)
    )
    return {
        "evaluation_s": round(ours, 3),
        "per_user_evaluation_s": round(theirs, 3),
        "evaluation_ratio": theirs / ours,
        "evaluation_floor_s": round(2 * user.numel() * len(item) / _product_rate(), 3),
    }


def _copy_bandwidth() -> float:
    """Bytes read plus written a second by a copy that misses the caches."""
    source, target = torch.ones(2**25), torch.empty(2**25)
    return 8 * source.numel() / min(_seconds(lambda: target.copy_(source)) for _ in range(5))


def _product_rate() -> float:
    """Multiplications plus additions a second of a large float32 matrix product."""
    matrix = torch.randn(1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: matrix @ matrix) for _ in range(5))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {
        "median": round(1000 * statistics.median(seconds), 1),
        "min": round(1000 * min(seconds), 1),
        "max": round(1000 * max(seconds), 1),
    }


if __name__ == "__main__":
    main()
