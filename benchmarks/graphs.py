"""Synthetic datasets with power-law degrees, and a trainer on one.

Two nodes of three are users. The user and the item of an edge are drawn independently, with a
density of x^-0.5 over users and x^-0.7 over items: the largest item of 3.3 million has about
1 % of the edges. Every node has at least one edge.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist.config import load_config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.prepare.pipeline import prepare
from cnsdiff_dist.prepare.recipe import Recipe
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Trainer

_CHUNK = 4_000_000
_EXPONENTS = {"user": 0.5, "item": 0.7}


def power_law_dataset(nodes: int, root: str = "data", edges_per_node: int = 10) -> str:
    """The path of the dataset of that many nodes, which is prepared unless it is there.

    A pair that is drawn twice counts once. Validation has only 5,000 rows, so that a benchmark of
    steps does not measure the ranking.
    """
    out = Path(root) / f"power-law-{nodes}"
    if (out / "manifest.json").exists():
        return str(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".parquet")
    edges = nodes * edges_per_node
    write_power_law_log(log, nodes, edges)
    recipe = Recipe(
        str(out),
        {"train": [str(log)]},
        given=True,
        drop_duplicates=True,
        valid_fraction=5_000 / edges,
        valid_ood_fraction=0.0,
        name=out.name,
    )
    prepare(recipe, print)
    log.unlink()
    return str(out)


def write_power_law_log(path: Path, nodes: int, edges: int, seed: int = 0) -> None:
    """Write ``edges`` rows of (user, item); the first rows have every node once."""
    rows = {"user": nodes * 2 // 3, "item": nodes - nodes * 2 // 3}
    generator = np.random.Generator(np.random.Philox(seed))
    schema = pa.schema([("user", pa.int64()), ("item", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, edges, _CHUNK):
            size = min(_CHUNK, edges - start)
            columns = [_nodes(generator, start, size, rows[side], side) for side in rows]
            writer.write_table(pa.table(columns, schema=schema))


def _nodes(
    generator: np.random.Generator, start: int, size: int, rows: int, side: str
) -> np.ndarray:
    """The nodes of a piece of the log: each node once, then draws from the density x^-a on (0, 1]
    by inversion."""
    drawn = generator.random(size) ** (1 / (1 - _EXPONENTS[side])) * rows
    every = np.arange(start, start + size)
    return np.where(every < rows, every, drawn.astype(np.int64))


def sampled_trainer(data: str, run: str, *words: str) -> Trainer:
    """A trainer of the demo's model that samples the graph at fan-out 10/5.

    It trains in the world that is joined; ``words`` override the config.
    """
    sampled = ["model.propagation=sampled", "model.fan_out=[10,5]"]
    places = [f"data.url={data}", f"run.dir={run}", "train.select_split=valid_iid"]
    config = load_config("configs/demo.yaml", [*places, *sampled, *words])
    trainer = Trainer(OpenRun(config, load_manifest(data), join_world(120)))
    trainer.step.set_learning_rates(0)
    return trainer
