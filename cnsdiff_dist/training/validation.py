"""Which checkpoint is best: the selection split, ranked under each adjustment for popularity."""

from typing import Any

from cnsdiff_dist.checkpoint.commit import Progress
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.adjustment import log_p_train
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.runs.opened import OpenRun


class Validation:
    """Evaluates the split that selects.

    Raises:
        UserError: the dataset lacks it.
    """

    def __init__(self, run: OpenRun) -> None:
        train, manifest = run.config.train, run.manifest
        if train.select_split not in manifest.splits:
            raise UserError(
                f"train.select_split={train.select_split}: dataset {manifest.name} has only "
                f"{', '.join(manifest.splits)}; choose another, or prepare it with one"
            )
        self._metric, self._alphas = train.select_metric, run.config.evaluation.alphas
        self._evaluator = run.evaluator(train.select_split)
        self._log_p_R = log_p_train(run.graph, run.world)

    def evaluate(self, recommender: Recommender) -> dict[str, Any]:
        """The result under the alpha of ``evaluation.alphas`` that serves the metric best; its
        metrics name that ``alpha``. Collective."""
        vectors, results = recommender.encode_all(), []
        for alpha in self._alphas:
            result = self._evaluator(*vectors, alpha * self._log_p_R if alpha else None)
            results.append({**result, "metrics": {**result["metrics"], "alpha": alpha}})
        return max(results, key=lambda result: result["metrics"][self._metric])

    def note(self, result: dict[str, Any], progress: Progress) -> bool:
        """Keep a result in the progress of a training; tells whether it is the best so far."""
        value = result["metrics"][self._metric]
        better: bool = value > progress.best
        if better:
            progress.best, progress.best_step = value, progress.step
            progress.best_alpha = result["metrics"]["alpha"]
        progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
        return better
