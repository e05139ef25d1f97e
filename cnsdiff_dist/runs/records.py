"""Reads the files of a run directory without torch, which takes seconds to import."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cnsdiff_dist import sections, storage
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.plain_yaml import read_yaml

CONFIG, DATASET, ENVIRONMENT = "config.yaml", "dataset.json", "environment.json"


def read_config_tree(url: str) -> dict[str, Any]:
    """Return the config.yaml of the run at ``url``, not validated.

    Raises:
        UserError: there is no run there, or its config.yaml is damaged.
    """
    path = f"{url}/{CONFIG}"
    if not storage.exists(path):
        raise UserError(f"{storage.display(url)}: no run here (no config.yaml)")
    tree = read_yaml(storage.read_text(path), storage.display(path))
    if not isinstance(tree, dict):
        raise UserError(f"{storage.display(path)}: damaged; choose another run.dir")
    return tree


@dataclass(frozen=True)
class RunSettings:
    """The part of a run's config that its status needs.

    Attributes:
        negatives: ``negatives.kind``.
        objective: ``objective.kind``.
    """

    negatives: str
    objective: str
    train: sections.Train


def read_settings(url: str) -> RunSettings:
    """Return a few settings of the run at ``url``.

    Raises:
        UserError: there is no run there, or its config.yaml is damaged.
    """
    tree, path = read_config_tree(url), storage.display(f"{url}/{CONFIG}")
    try:
        train = sections.Train.model_validate(tree["train"])
        return RunSettings(str(tree["negatives"]["kind"]), str(tree["objective"]["kind"]), train)
    except (KeyError, TypeError, ValidationError):
        raise UserError(f"{path}: damaged; choose another run.dir") from None


def read_metrics(url: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl.

    A line that is no JSON object with a ``kind`` is left out, such as the torn last line of a run
    that was killed.

    Raises:
        UserError: the file cannot be read.
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
