"""Run a function on several real ranks: torchrun's own agent, gloo, one process each."""

import multiprocessing
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# What a rank imports, and what torchrec and DeepSpeed import on first use: together many seconds.
_PRELOADED = ["pytest", "deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.optim"]
_PRELOADED += ["torchrec", "cnsdiff_dist.cli", "cnsdiff_dist.training.loop"]


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` on each of ``size`` ranks and return what it returns, by rank.

    The processes are new for each call, so no state passes from one call to the next. Without a
    GPU they are forks of one server that has imported the libraries once and has done nothing
    else; it ends with pytest. A fork cannot use CUDA, so with a GPU they are spawned.

    Args:
        function: must be importable by name.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn" if torch.cuda.is_available() else "forkserver",
    )
    results = elastic_launch(config, _call)(_Surroundings(), function, args)
    return [results[rank] for rank in range(size)]


class _Surroundings:
    """The environment and the working directory of the caller, taken over when it is unpickled.

    The server has those of its start. A process unpickles its arguments before the agent's
    variables (RANK and the like) are set, so those are kept.
    """

    def __getstate__(self) -> tuple[dict[str, str], str]:
        return dict(os.environ), os.getcwd()

    def __setstate__(self, state: tuple[dict[str, str], str]) -> None:
        environment, folder = state
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)


def _call(_: _Surroundings, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
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
