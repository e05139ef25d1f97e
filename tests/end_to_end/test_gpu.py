"""The same training on a GPU. Skipped without one; never run yet, for want of one."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.world import join_world
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Trainer
from tests.support.ranks import run_ranks
from tests.support.small import small_config
from tests.support.tables import gather

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SAMPLED = {"propagation": "sampled", "fan_out": [3, 2]}


def _train(config: Config, cuda: bool) -> tuple[dict[str, torch.Tensor], float]:
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world, manifest = join_world(60), load_manifest(config.data.url)
    assert (world.device.type == "cuda") == cuda
    trainer = Trainer(OpenRun(config, manifest, world))
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    trainer.fit(None)
    weights = trainer.step.recommender.tables.weights()
    return {name: gather(weight, world).cpu() for name, weight in weights.items()}, (
        trainer.progress.best
    )


@pytest.mark.parametrize("model", [{"propagation": "full"}, SAMPLED, {"layers": 0}])
def test_a_gpu_trains_what_a_cpu_trains(dataset: str, tmp_path: Path, model: Any) -> None:
    found = [
        run_ranks(1, _train, small_config(dataset, tmp_path / str(cuda), model=model), cuda)[0]
        for cuda in (False, True)
    ]
    for name, table in found[0][0].items():
        assert torch.allclose(found[1][0][name], table, atol=1e-3)
    assert found[1][1] == pytest.approx(found[0][1], abs=0.02)


@pytest.mark.parametrize(
    "sections",
    [
        {"tables": {"optimizer": "adam", "lr": 0.01}},
        {"tables": {"optimizer": "partial_rowwise_adam", "lr": 0.01}},
        {"tables": {"placement": "uvm"}},
        {"tables": {"user_dtype": "fp16", "item_dtype": "fp16"}},
        {"generator": {"precision": "bf16"}},
    ],
)
def test_what_a_gpu_offers_learns(dataset: str, tmp_path: Path, sections: Any) -> None:
    config = small_config(dataset, tmp_path / "run", **sections)
    assert run_ranks(1, _train, config, True)[0][1] > 0.02


def test_a_step_does_not_wait_for_the_gpu(dataset: str, tmp_path: Path) -> None:
    """This holds at a world of one; TorchRec's exchange of ids between ranks has to wait."""
    config = small_config(dataset, tmp_path / "run", model=SAMPLED)
    manifest, world = load_manifest(dataset), join_world(60)
    trainer = Trainer(OpenRun(config, manifest, world))
    steps = trainer.loader.steps(0)
    trainer.take_step(next(steps))
    ready = next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.take_step(ready)
    finally:
        torch.cuda.set_sync_debug_mode("default")
