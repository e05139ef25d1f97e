import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cnsdiff_dist.cli import main
from cnsdiff_dist.config import Config, parse_config
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.world import World, join_world
from tests.s3server import bucket, new_clients  # noqa: F401  (fixtures)

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")


@pytest.fixture(scope="session")
def world() -> World:
    """A world of one, the same that `cnsdiff train` joins without a launcher."""
    return join_world(timeout_seconds=60)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small synthetic dataset, prepared through the command line."""
    out = str(tmp_path_factory.mktemp("data") / "synthetic")
    assert main(["prepare", out, "--synthetic", "--users", "700", "--items", "250"]) == 0
    return out


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "other")
    words = ["--synthetic", "--users", "700", "--items", "250", "--seed", "9"]
    assert main(["prepare", out, *words]) == 0
    return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


@pytest.fixture
def tiny_graph() -> GraphArrays:
    """5 users x 4 items; user 3 has nothing, user 4 everything, item 3 only user 4."""
    return graph_of([(0, 0), (0, 1), (1, 1), (2, 0), (2, 2), *((4, i) for i in range(4))], 5, 4)


def graph_of(pairs: list[tuple[int, int]], users: int, items: int) -> GraphArrays:
    import numpy as np

    def csr(rows: "np.ndarray", columns: "np.ndarray", count: int) -> "tuple[np.ndarray, ...]":
        order = np.lexsort((columns, rows))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
        return indptr.astype(np.int64), columns[order].astype(np.int32)

    user, item = np.array(pairs, np.int64).reshape(-1, 2).T
    return GraphArrays(*csr(user, item, users), *csr(item, user, items))
