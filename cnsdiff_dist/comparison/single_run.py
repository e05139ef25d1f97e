"""One run of a suite: train it, evaluate it on every test split, and write its result.json last."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.suite import Job
from cnsdiff_dist.config import Config
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.runs.directory import read_config
from cnsdiff_dist.runs.records import read_metrics

RESULT = "result.json"
TRADE_OFF = "trade_off.json"
_TRADE_OFF_ALPHAS = (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def read_result(url: str) -> dict[str, Any] | None:
    """The result.json of a run; None if it is missing or is no JSON."""
    path = f"{url}/{RESULT}"
    if not storage.exists(path):
        return None
    try:
        result: dict[str, Any] = json.loads(storage.read_text(path))
    except ValueError:
        return None
    return result


def finished_result(job: Job) -> dict[str, Any] | None:
    """The result of a job that was done with this very config and dataset, else None."""
    result = read_result(job.url)
    if result is None or not storage.exists(f"{job.url}/config.yaml"):
        return None
    if result.get("config_digest") != _config_digest(job.url):
        return None  # the run has changed since
    same = _without_urls(read_config(job.url)) == _without_urls(job.config)
    digest = load_manifest(job.config.data.url).digest
    return result if same and result["dataset_digest"] == digest else None


def run_job(job: Job, train: Callable[[Config], None]) -> None:
    """Do what is left of a run; a finished run stays as it is.

    Raises:
        UserError: from training or evaluating.
    """
    if finished_result(job):
        return
    started = time.monotonic()
    storage.delete_tree(f"{job.url}/{RESULT}")
    train(job.config)
    result: dict[str, Any] = {
        "config_digest": _config_digest(job.url),
        "dataset_digest": load_manifest(job.config.data.url).digest,
        "selection": best_validation(job.url),
        "evaluations": _evaluate_tests(job.url, job.config.data.url),
        "seconds": time.monotonic() - started,
    }
    storage.write_json(f"{job.url}/{RESULT}", result)
    _keep_best_checkpoint(job.url, result["selection"]["step"])


def analyse_run(url: str, data_url: str | None = None) -> None:
    """Diagnose a finished run, and write its test metrics under a range of alpha. Collective.

    Args:
        data_url: the dataset, if it has moved.

    Raises:
        UserError: from reading the run.
    """
    from cnsdiff_dist.comparison.diagnostics import diagnose
    from cnsdiff_dist.inference.trained_model import open_trained

    diagnose(url, data_url)
    model = open_trained(url, data_url)
    log_p_R, curve = model.log_p(None), []
    for split in (name for name in model.run.manifest.splits if name.startswith("test")):
        evaluator = model.run.evaluator(split)
        for alpha in _TRADE_OFF_ALPHAS:
            metrics = evaluator(model.user_RD, model.item_RD, alpha * log_p_R)["metrics"]
            curve.append({"split": split, "alpha": alpha, "metrics": metrics})
    if model.run.world.is_main:
        storage.write_json(f"{url}/{TRADE_OFF}", curve)
    model.run.world.barrier()


def read_trade_off(url: str) -> list[dict[str, Any]]:
    """What :func:`analyse_run` wrote: ``split``, ``alpha`` and ``metrics``; empty if it did not."""
    path = f"{url}/{TRADE_OFF}"
    return json.loads(storage.read_text(path)) if storage.exists(path) else []


def best_validation(url: str) -> dict[str, Any]:
    """The best validation of a run: ``split``, ``metric``, ``value`` and ``step``.

    Raises:
        UserError: it was never evaluated.
    """
    config = read_config(url).train
    lines = [line for line in read_metrics(url) if line["kind"] == config.select_split]
    if not lines:
        raise UserError(f"{storage.display(url)}: not evaluated yet; train it further")
    best = max(lines, key=lambda line: line[config.select_metric])  # the first of equals
    return {
        "split": config.select_split,
        "metric": config.select_metric,
        "value": best[config.select_metric],
        "step": best["step"],
    }


def _config_digest(url: str) -> str:
    return hashlib.sha256(storage.read_bytes(f"{url}/config.yaml")).hexdigest()


def _without_urls(config: Config) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    del tree["run"]["dir"], tree["data"]["url"]
    return tree


def _evaluate_tests(url: str, data_url: str) -> list[dict[str, Any]]:
    """Evaluate a run on every test split, without and with calibration of alpha.

    The metrics of every user go to evaluations/SPLIT.ADJUSTMENT.users.parquet.

    Returns:
        One entry per test split and adjustment.
    """
    from cnsdiff_dist.inference.trained_model import calibrate, open_trained

    plain = open_trained(url, data_url)
    calibrate(plain)
    models = {"none": (plain, 0.0), "calibrated": plain.with_alpha("auto")}
    found = []
    for split in (name for name in plain.run.manifest.splits if name.startswith("test")):
        evaluator = plain.run.evaluator(split)
        for adjustment, (model, alpha) in models.items():
            result, users = evaluator.with_user_values(model.user_RD, model.item_RD)
            found.append({"adjustment": adjustment, "alpha": alpha, **result})
            path = f"{url}/evaluations/{split}.{adjustment}.users.parquet"
            with storage.open_write(path) as file:
                pq.write_table(pa.table(users), file)
    return found


def _keep_best_checkpoint(url: str, step: int) -> None:
    from cnsdiff_dist.checkpoint.manager import Checkpoints
    from cnsdiff_dist.distributed.world import join_world

    Checkpoints(url, join_world(60)).prune(0, step)
