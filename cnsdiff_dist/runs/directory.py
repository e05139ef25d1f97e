"""A run directory: its layout, and whether a config and a dataset may continue it.

config.yaml        the resolved config          dataset.json   the dataset's digest
environment.json   versions, revision, world    metrics.jsonl  one line per log and evaluation
checkpoints/       see checkpoint/manager.py   evaluations/   SPLIT.json
"""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnsdiff_dist import storage
from cnsdiff_dist.config import Config, dump_config, parse_config, read_yaml
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.errors import UserError

if TYPE_CHECKING:
    from cnsdiff_dist.distributed.world import (
        World,  # with torch, which `cnsdiff status` does not wait for
    )

_CONFIG, _DATASET, _ENVIRONMENT = "config.yaml", "dataset.json", "environment.json"
# A run may be continued under another value of these: they do not change what is learned, but for
# the order of sums, or, like the number of epochs, only how long.
_MAY_CHANGE = {
    "data.url", "data.prefetch_blocks", "data.workers", "run.dir", "run.timeout_seconds",
    "run.retry_seconds", "run.grace_seconds", "run.metrics_port", "tables.sharding",
    "tables.placement", "generator.zero_stage", "train.epochs", "train.max_steps",
    "train.patience", "train.log_every", "train.non_finite", "train.max_growth",
    "checkpoint.every_steps", "checkpoint.keep", "checkpoint.background",
    "evaluation.users_per_chunk",
}  # fmt: skip


def check_run(config: Config, manifest: Manifest) -> None:
    """Whether this config and dataset may start, or continue, the run at ``config.run.dir``.

    Raises:
        UserError: it belongs to another dataset or config, or the directory is not a run's.
    """
    url = config.run.dir
    if storage.exists(f"{url}/{_CONFIG}"):
        check_dataset(url, manifest)
        _check_same(read_config(url), config, storage.display(f"{url}/{_CONFIG}"))
    elif strangers := set(storage.list_files(url)) - {_DATASET, _ENVIRONMENT}:
        raise UserError(
            f"{storage.display(url)}: not empty ({min(strangers)}) and not a run; "
            "choose another run.dir"
        )


def open_run(config: Config, manifest: Manifest, world: "World") -> None:
    """Write what identifies the run; the config last, since it makes the directory a run.

    Raises:
        UserError: it cannot be written.
    """
    if world.is_main:
        url = config.run.dir
        if not storage.exists(f"{url}/{_CONFIG}"):
            storage.write_json(
                f"{url}/{_DATASET}", {"name": manifest.name, "digest": manifest.digest}
            )
        storage.write_json(f"{url}/{_ENVIRONMENT}", _environment(world))
        storage.write_text(f"{url}/{_CONFIG}", dump_config(config))
    world.barrier()


def read_config(url: str) -> Config:
    """The resolved config of a run.

    Raises:
        UserError: there is no run there.
    """
    path = f"{url}/{_CONFIG}"
    if not storage.exists(path):
        raise UserError(f"{storage.display(url)}: no run here (no config.yaml)")
    tree = read_yaml(storage.read_text(path), storage.display(path))
    if not isinstance(tree, dict):
        raise UserError(f"{storage.display(path)}: damaged; choose another run.dir")
    return parse_config(tree, storage.display(path))


def read_metrics(url: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last one is left out.

    Raises:
        UserError: it cannot be read.
    """
    path = f"{url}/metrics.jsonl"
    found = []
    for line in storage.read_text(path).splitlines() if storage.exists(path) else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and "kind" in record:
            found.append(record)
    return found


def check_dataset(url: str, manifest: Manifest) -> None:
    """
    Raises:
        UserError: the run was trained on another dataset.
    """
    path = f"{url}/{_DATASET}"
    try:
        saved = json.loads(storage.read_text(path))
        name, digest = saved["name"], saved["digest"]
        if not isinstance(name, str) or not isinstance(digest, str):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{storage.display(path)}: damaged; choose another run.dir") from None
    if digest != manifest.digest:
        raise UserError(
            f"{storage.display(url)}: this run was trained on another dataset ({name}, "
            f"digest {digest[:12]}, not {manifest.digest[:12]}); choose another run.dir"
        )


def _check_same(saved: Config, config: Config, where: str) -> None:
    old, new = _flat(saved), _flat(config)
    for key in old:
        if key not in _MAY_CHANGE and old[key] != new[key]:
            raise UserError(
                f"{where}: this run has {key}={old[key]}, not {new[key]}; "
                "choose another run.dir, or set it back"
            )


def _flat(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    return {f"{name}.{key}": tree[name][key] for name in tree for key in tree[name]}


def versions() -> dict[str, str]:
    """Of this package and those that a result depends on, as installed."""
    names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "deepspeed", "pyarrow", "fsspec")
    found = {}
    for name in ("cnsdiff_dist", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _environment(world: "World") -> dict[str, Any]:
    return {
        "packages": versions(),
        "python": platform.python_version(),
        "git_revision": git_revision(),
        "world_size": world.size,
        "device": world.device.type,
    }


def git_revision() -> str | None:
    """The commit of the code that runs, with ``+`` when files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is another's repository
        revision = git("rev-parse", "HEAD")
        return revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
