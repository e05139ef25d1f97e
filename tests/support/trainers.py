"""Trainings in this process, and what they have learned."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cnsdiff_dist.cli import main
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.distributed.dense_engine import State
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.runs.opened import OpenRun
from cnsdiff_dist.training.loop import Trainer
from tests.support.small import write_config
from tests.support.tables import gather

EVERY_3 = {"every_steps": 3}


def trained_run(dataset: str, folder: Path) -> Path:
    """Train the small config with `cnsdiff train`.

    Returns:
        The run directory, in ``folder``.
    """
    assert main(["train", write_config(folder / "small.yaml", dataset, folder / "run")]) == 0
    return folder / "run"


def new_trainer(config: Any, world: World) -> Trainer:
    manifest = load_manifest(config.data.url)
    return Trainer(OpenRun(config, manifest, world))


def everything(trainer: Trainer, world: World) -> tuple[dict[str, torch.Tensor], State]:
    """Return every number of a training: the tables and their optimizer state, and the state of
    the dense engine. Collective."""
    tables = trainer.step.state()["tables"]
    flat = {name: gather(tensor, world) for name, tensor in tables["weights"].items()}
    for table in ("user", "item"):
        # With table-wise sharding a rank knows only the state of its own tables.
        mine = tables["optimizer"].get(f"{table}.momentum1")
        per_value = trainer.config.tables.optimizer == "adagrad"
        whole = torch.zeros(flat[table].shape if per_value else [len(flat[table])])
        for shard in mine.local_shards() if mine is not None else []:
            first, rows = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            whole[first : first + rows] = shard.tensor.detach()
        flat[f"{table}.momentum1"] = world.sum(whole)
    return flat, trainer.step.dense.state()


def train_steps(config: Any, stop_after: int | None) -> Any:
    """Train, or resume, in the world that is joined here.

    Args:
        stop_after: stop dead after so many steps of this process.

    Returns:
        What ``everything`` returns and the progress; None where the training was stopped.
    """
    world = join_world(60)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    trainer = new_trainer(config, world)
    trainer.resume()
    done, real_step = 0, trainer.take_step

    def step(batch: Any) -> Any:
        nonlocal done
        if stop_after is not None and done == stop_after:
            raise KeyboardInterrupt
        done += 1
        return real_step(batch)

    trainer.take_step = step  # type: ignore[method-assign]
    try:
        trainer.fit(None)
    except KeyboardInterrupt:
        return None
    return *everything(trainer, world), asdict(trainer.progress)


def assert_same(a: Any, b: Any, exact: bool) -> None:
    """Compare two results of ``train_steps``: to the bit, or up to the order of float sums."""

    def check(x: torch.Tensor, y: torch.Tensor, where: str) -> None:
        # Relative to the tensor's own size: an optimizer's moments may be as small as 1e-7.
        distance = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        assert torch.equal(x, y) if exact else distance < 1e-3, f"{where}: {distance}"

    for name in a[0]:
        check(a[0][name], b[0][name], name)
    assert a[1].keys() == b[1].keys()
    assert a[2] == (b[2] if exact else pytest.approx(b[2], rel=0.05))
    for name in a[1]:
        for key in a[1][name]:
            check(a[1][name][key], b[1][name][key], f"{name}.{key}")
