import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed would have functions compiled that no test calls: seconds at the start of each process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
import torch
from hypothesis import settings

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.world import World, join_world
from tests.support.s3server import bucket, new_clients  # noqa: F401  (fixtures)
from tests.support.small import graph_of

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


@pytest.fixture
def tiny_graph() -> GraphArrays:
    """5 users x 4 items; user 3 has nothing, user 4 everything, item 3 only user 4."""
    return graph_of([(0, 0), (0, 1), (1, 1), (2, 0), (2, 2), *((4, i) for i in range(4))], 5, 4)
