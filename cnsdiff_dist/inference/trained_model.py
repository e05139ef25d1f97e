"""A trained run, opened for reading: its best checkpoint's embeddings.

Shapes: R rows that this rank owns, D embedding dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cnsdiff_dist import storage
from cnsdiff_dist.checkpoint.commit import Commit, Progress, record_damage
from cnsdiff_dist.checkpoint.manager import Checkpoints
from cnsdiff_dist.config import Config, Evaluation
from cnsdiff_dist.data.dataset import load_manifest
from cnsdiff_dist.data.graph import GraphArrays, open_graph
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World, join_world
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.adjustment import (
    Calibration,
    adjusted,
    fit_alpha,
    log_p_exposure,
    log_p_train,
    read_calibration,
    write_calibration,
)
from cnsdiff_dist.evaluation.evaluator import Evaluator
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.runs.directory import check_dataset, read_config


@dataclass(frozen=True)
class Trained:
    """``user_RD`` and ``item_RD`` are this rank's own rows (:meth:`World.own`), their dot
    product the score at ``step``; ``alpha`` is the adjustment under which validation selected
    it."""

    config: Config
    data_url: str
    manifest: Manifest
    graph: GraphArrays
    world: World
    run_url: str
    step: int
    alpha: float
    user_RD: Tensor
    item_RD: Tensor

    def evaluator(self, split: str, evaluation: Evaluation | None = None) -> Evaluator:
        """Of a split, with the lists that the run's config asks for unless others are given."""
        return Evaluator(
            self.data_url, self.manifest, self.graph, split, evaluation or self.config.evaluation,
            self.world,
        )  # fmt: skip

    def log_p(self, exposure: str | None) -> Tensor:
        """log p_env(i) of the train split, or of a table of recent exposure, [R]."""
        if exposure is None:
            return log_p_train(self.graph, self.world)
        return log_p_exposure(exposure, self.data_url, self.manifest, self.world)

    def with_alpha(self, alpha: str | float) -> tuple["Trained", float]:
        """Itself with vectors that score with the adjustment, and the alpha that is used.

        ``auto`` takes the run's calibration if it has one, else the alpha that validation
        selected in training; ``none`` is 0; that and a number go with the train split's p.

        Raises:
            UserError: the calibration is of another checkpoint; ``alpha`` is none of these.
        """
        exposure = None
        if alpha == "none":
            value = 0.0
        elif alpha != "auto":
            value = _number(alpha)
        elif found := read_calibration(self.run_url, self.step):
            exposure, value = found.exposure, found.alpha
        else:
            value = self.alpha
        log_p_R = self.log_p(exposure) if value else None
        vectors = adjusted(self.user_RD, self.item_RD, value, log_p_R)
        return replace(self, user_RD=vectors[0], item_RD=vectors[1]), value


def open_trained(run_url: str, data_url: str | None) -> Trained:
    """Load a run's best checkpoint by validation, at any world size. Collective.

    Raises:
        UserError: no run or no committed checkpoint there, or another dataset.
    """
    config = read_config(run_url)
    data_url = data_url or config.data.url
    manifest = load_manifest(data_url)
    check_dataset(run_url, manifest)
    world = join_world(config.run.timeout_seconds)
    graph = open_graph(data_url, manifest, verify=world.local_rank == 0)
    checkpoints = Checkpoints(run_url, world)
    commit, newest = best_commit(checkpoints, run_url)
    recommender = Recommender(config, graph, world)
    checkpoints.load(commit, {"tables": {"weights": recommender.tables.weights()}})
    vectors = recommender.encode_all()
    return Trained(config, data_url, manifest, graph, world, run_url, commit.step,
        newest.best_alpha, *vectors,
    )  # fmt: skip


def calibrate(
    model: Trained, split: str | None = None, metric: str | None = None,
    exposure: str | None = None, alphas: Sequence[float] = (-0.5, 0.0, 0.5, 1.0, 1.5),
) -> Calibration:  # fmt: skip
    """Fit alpha on a validation split and write it into the run. Collective.

    Raises:
        UserError: no such split or metric; see :func:`log_p_exposure`.
    """
    train = model.config.train
    split, metric = split or train.select_split, metric or train.select_metric
    evaluator = model.evaluator(split)
    log_p_R = model.log_p(exposure)

    def evaluate(alpha: float) -> dict[str, float]:
        result = evaluator(model.user_RD, model.item_RD, alpha * log_p_R)
        metrics: dict[str, float] = result["metrics"]
        if metric not in metrics:
            raise UserError(f"--metric {metric}: this run knows {', '.join(metrics)}")
        return metrics

    best, curve = fit_alpha(evaluate, metric, list(alphas))
    found = Calibration(best, split, metric, model.step, exposure, curve)
    if model.world.is_main:
        write_calibration(model.run_url, found)
    model.world.barrier()
    return found


def _number(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--alpha {text}: auto, none or a number")
    return value


def best_commit(checkpoints: Checkpoints, run_url: str) -> tuple[Commit, Progress]:
    """The best checkpoint by validation, found whole, and the progress of the newest, which knows
    which one that is. Collective.

    Raises:
        UserError: there is none, it was never evaluated, or one of the two is damaged.
    """
    where, commits = storage.display(run_url), checkpoints.committed()
    if not commits:
        raise UserError(f"{where}: no committed checkpoint yet; train it first")
    newest = commits[-1]
    _refuse_damage(newest, record_damage(newest))
    best_step = newest.progress.best_step
    matching = [commit for commit in commits if commit.step == best_step]
    if not matching:
        why = f"its best checkpoint, step {best_step}, is gone" if best_step else "not evaluated"
        raise UserError(f"{where}: {why}; train it further")
    _refuse_damage(matching[0], checkpoints.damage(matching[0]))
    return matching[0], newest.progress


def _refuse_damage(commit: Commit, damage: str | None) -> None:
    if damage:
        raise UserError(
            f"{storage.display(commit.url)}: damaged ({damage}); restore it, or train further"
        )
