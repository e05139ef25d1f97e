"""A trained run, opened for reading: the embeddings of its best checkpoint.

Shapes: R rows that this rank owns, D embedding dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

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
from cnsdiff_dist.runs.opened import OpenRun, reopen_run
from cnsdiff_dist.training.components import make_recommender


@dataclass(frozen=True)
class TrainedModel:
    """What a run learned.

    Attributes:
        run: the run that it was trained in.
        step: of the checkpoint.
        alpha: the adjustment for popularity under which validation selected the checkpoint.
        user_RD, item_RD: the rows that this rank owns (:meth:`World.own_rows`); the dot product of
            a user's and an item's is their score.
    """

    run: OpenRun
    step: int
    alpha: float
    user_RD: Tensor
    item_RD: Tensor

    def log_p(self, exposure: str | None) -> Tensor:
        """log p_env(i) of the train split, or of a table of recent exposure, [R]."""
        run = self.run
        if exposure is None:
            return log_p_train(run.graph, run.world)
        return log_p_exposure(exposure, run.data_url, run.manifest, run.world)

    def with_alpha(self, alpha: str | float) -> tuple["TrainedModel", float]:
        """The same model with vectors whose score is adjusted for popularity, and the alpha used.

        Args:
            alpha: ``auto`` takes the run's calibration if it has one, else the alpha that
                validation selected in training; ``none`` is 0; a number, like the selected alpha,
                goes with the popularity of the train split.

        Raises:
            UserError: the calibration is of another checkpoint; ``alpha`` is none of these.
        """
        exposure = None
        if alpha == "none":
            value = 0.0
        elif alpha != "auto":
            value = _number(alpha)
        elif found := read_calibration(self.run.url, self.step):
            exposure, value = found.exposure, found.alpha
        else:
            value = self.alpha
        log_p_R = self.log_p(exposure) if value else None
        user_RD, item_RD = adjusted(self.user_RD, self.item_RD, value, log_p_R)
        return replace(self, user_RD=user_RD, item_RD=item_RD), value


def open_trained(run_url: str, data_url: str | None) -> TrainedModel:
    """Load a run's best checkpoint by validation, at any world size. Collective.

    Raises:
        UserError: no run or no committed checkpoint there, or another dataset.
    """
    run = reopen_run(run_url, data_url)
    commit, newest = run.best_commit()
    recommender = make_recommender(run.config, run.graph, run.world)
    run.checkpoints.load(commit, {"tables": {"weights": recommender.tables.weights()}})
    user_RD, item_RD = recommender.encode_all()
    return TrainedModel(run, commit.step, newest.best_alpha, user_RD, item_RD)


def calibrate(
    model: TrainedModel,
    split: str | None = None,
    metric: str | None = None,
    exposure: str | None = None,
    alphas: Sequence[float] = (-0.5, 0.0, 0.5, 1.0, 1.5),
) -> Calibration:
    """Fit alpha on a validation split and write it into the run. Collective.

    Raises:
        UserError: no such split or metric; see :func:`log_p_exposure`.
    """
    run, train = model.run, model.run.config.train
    split, metric = split or train.select_split, metric or train.select_metric
    evaluator = run.evaluator(split)
    log_p_R = model.log_p(exposure)

    def evaluate(alpha: float) -> dict[str, float]:
        result = evaluator(model.user_RD, model.item_RD, alpha * log_p_R)
        metrics: dict[str, float] = result["metrics"]
        if metric not in metrics:
            raise UserError(f"--metric {metric}: this run knows {', '.join(metrics)}")
        return metrics

    best, curve = fit_alpha(evaluate, metric, list(alphas))
    found = Calibration(best, split, metric, model.step, exposure, curve)
    if run.world.is_main:
        write_calibration(run.url, found)
    run.world.barrier()
    return found


def _number(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"--alpha {text}: auto, none or a number")
    return value
