"""What the adversarial tests attack: a copy of the dataset and a copy of a run."""

import shutil
from pathlib import Path

import pytest

from cnsdiff_dist.commands.train import train
from cnsdiff_dist.distributed.world import World
from tests.support.hostile import QUICK, Victim
from tests.support.small import small_config


@pytest.fixture(scope="module")
def victim(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the dataset that a test leaves as it found it."""
    return Path(shutil.copytree(dataset, tmp_path_factory.mktemp("hostile") / "victim"))


@pytest.fixture(scope="session")
def quick_run(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch, which nobody changes."""
    folder = tmp_path_factory.mktemp("hostile-run") / "run"
    train(small_config(dataset, folder, **QUICK))
    return folder


@pytest.fixture(scope="module")
def attacked(
    quick_run: Path, dataset: str, world: World, tmp_path_factory: pytest.TempPathFactory
) -> Victim:
    return Victim(quick_run, tmp_path_factory.mktemp("attacked") / "run", dataset, world)
