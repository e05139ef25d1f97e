"""A run directory: its layout, and which configs and datasets may continue the run.

config.yaml        the resolved config
dataset.json       the dataset's name and digest
environment.json   versions, git revision, world size
metrics.jsonl      one line per log and per evaluation
checkpoints/       see checkpoint/manager.py
evaluations/       SPLIT.json
"""

import json
from typing import Any

from cnsdiff_dist import storage
from cnsdiff_dist.config import KINDS, Config, drop_other_kinds, dump_config, parse_config
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.provenance import environment
from cnsdiff_dist.runs.records import CONFIG, DATASET, ENVIRONMENT, read_config_tree

# A run may be continued with other values of these keys. They change how long it trains, or nothing
# that is learned except for the order of sums.
_MAY_CHANGE = set(
    """
    data.url data.prefetch_blocks data.workers run.dir run.timeout_seconds run.retry_seconds
    run.grace_seconds run.metrics_port tables.sharding tables.placement generator.zero_stage
    train.epochs train.max_steps train.patience train.log_every train.non_finite
    train.max_growth checkpoint.every_steps checkpoint.keep checkpoint.background
    evaluation.users_per_chunk
    """.split()
)


def check_run(config: Config, manifest: Manifest) -> None:
    """Check that this config and dataset may start or continue the run at ``config.run.dir``.

    Raises:
        UserError: the run has another dataset or config, or the directory holds something else.
    """
    url = config.run.dir
    if storage.exists(f"{url}/{CONFIG}"):
        check_dataset(url, manifest)
        _check_same(read_config(url), config, storage.display(f"{url}/{CONFIG}"))
    elif other_files := set(storage.list_files(url)) - {DATASET, ENVIRONMENT}:
        raise UserError(
            f"{storage.display(url)}: not empty ({min(other_files)}) and not a run; "
            "choose another run.dir"
        )


def write_identity(config: Config, manifest: Manifest, world: World) -> None:
    """Write the config, the dataset's digest and the environment of a run. Collective.

    The config comes last, because it makes the directory a run.

    Raises:
        UserError: a file cannot be written.
    """
    if world.is_main:
        url = config.run.dir
        if not storage.exists(f"{url}/{CONFIG}"):
            storage.write_json(
                f"{url}/{DATASET}", {"name": manifest.name, "digest": manifest.digest}
            )
        storage.write_json(f"{url}/{ENVIRONMENT}", environment(world))
        storage.write_text(f"{url}/{CONFIG}", dump_config(config))
    world.barrier()


def read_config(url: str) -> Config:
    """Return the resolved config of the run at ``url``.

    Raises:
        UserError: there is no run there, or its config is damaged.
    """
    tree = read_config_tree(url)
    for section in KINDS:  # earlier builds wrote the keys of every kind, of which only some counted
        drop_other_kinds(tree, section)
    return parse_config(tree, storage.display(f"{url}/{CONFIG}"))


def check_dataset(url: str, manifest: Manifest) -> None:
    """Check that the run at ``url`` was trained on this dataset.

    Raises:
        UserError: it was trained on another one, or its dataset.json is damaged.
    """
    path = f"{url}/{DATASET}"
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
