"""Runs a function on several real ranks: torchrun's own agent, gloo, one process each."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of ``size`` ranks; it must be importable."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    results = elastic_launch(config, _call)(function, args)
    return [results[rank] for rank in range(size)]


def _call(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    from cnsdiff_dist.cli import quiet
    from cnsdiff_dist.distributed.world import leave_world

    quiet()
    try:
        return function(*args)
    finally:
        leave_world()


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
