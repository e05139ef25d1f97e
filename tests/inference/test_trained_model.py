"""Which checkpoint of a run `open_trained` loads."""

import json
import shutil
from pathlib import Path

import pytest

from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.inference.trained_model import open_trained
from tests.support.sealing import seal
from tests.support.small import small_config


def test_the_best_checkpoint_is_what_is_opened(dataset: str, tmp_path: Path, world: World) -> None:
    """Best, newest and oldest are three different checkpoints here."""
    config = small_config(dataset, tmp_path / "run", train={"epochs": 3}, checkpoint={"keep": 9})
    train(config)
    checkpoints = Checkpoints(config.run.dir, world)
    oldest, middle, newest = checkpoints.committed()
    record = json.loads((Path(newest.url) / "commit.json").read_text())
    record["progress"]["best_step"] = middle.step
    seal(Path(newest.url), record)
    assert oldest.step < middle.step < newest.step
    assert open_trained(config.run.dir, None).step == middle.step
    shutil.rmtree(middle.url)
    with pytest.raises(UserError, match=r"best checkpoint.* is gone"):
        open_trained(config.run.dir, None)
