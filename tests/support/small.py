"""A config and a graph that are small enough for tests."""

from pathlib import Path

import numpy as np
import yaml

from cnsdiff_dist.config import Config, parse_config
from cnsdiff_dist.data.graph import GraphArrays

SMALL = {
    "model": {"dim": 16},
    "train": {"epochs": 2, "batch": 512, "log_every": 5},
    "data": {"block_rows": 300},
    "generator": {"hidden": 32},
}


def small_config(dataset: str, run: Path | str, **sections: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {name: dict(value) for name, value in SMALL.items()}
    tree["run"] = {"dir": str(run)}
    tree["data"]["url"] = dataset
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return parse_config(tree, "test")


def write_config(path: Path, dataset: str, run: Path | str, **sections: dict[str, object]) -> str:
    """Write ``small_config`` as YAML.

    Returns:
        The path, as a word of a command line.
    """
    config = small_config(dataset, run, **sections)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def graph_of(pairs: list[tuple[int, int]], users: int, items: int) -> GraphArrays:
    def csr(rows: np.ndarray, columns: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        order = np.lexsort((columns, rows))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
        return indptr.astype(np.int64), columns[order].astype(np.int32)

    user, item = np.array(pairs, np.int64).reshape(-1, 2).T
    return GraphArrays(*csr(user, item, users), *csr(item, user, items))
