"""Whether ours differs from the best other method by more than chance, user by user."""

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.comparison.results import (
    TABLE_METRICS,
    TEST_SPLITS,
    FinishedRun,
    adjustments,
    best_other,
    chosen_runs,
)
from cnsdiff_dist.comparison.suite import Suite

Floats = npt.NDArray[np.float64]
Stars = dict[tuple[str, str, str, str], str]
"""``*``, ``**``, ``***`` or nothing, by dataset, adjustment, split and metric."""


def significance_stars(suite: Suite, runs: list[FinishedRun]) -> Stars:
    """Stars for p below 0.05, 0.01 and 0.001 of ours against the best other method."""
    found = {}
    for dataset in suite.datasets:
        other = best_other(suite, runs, dataset)
        sides = [chosen_runs(runs, dataset, m) for m in (suite.ours, other) if m]
        if len(sides) < 2:
            continue
        for adjustment in adjustments(runs):
            for split in TEST_SPLITS:
                for metric in TABLE_METRICS:
                    p = p_value(sides[0], sides[1], split, adjustment, metric)
                    stars = "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else ""
                    found[dataset, adjustment, split, metric] = stars
    return found


def p_value(
    ours: list[FinishedRun], other: list[FinishedRun], split: str, adjustment: str, metric: str
) -> float:
    """p of the mean difference over users, each user's value a mean over seeds; 1 if unknown."""
    sides = [_user_values(runs, split, adjustment, metric) for runs in (ours, other)]
    if len(sides[0]) != len(sides[1]) or not len(sides[0]):
        return 1.0
    return paired_bootstrap(sides[0] - sides[1])


def _user_values(runs: list[FinishedRun], split: str, adjustment: str, metric: str) -> Floats:
    """Means over seeds [users], in the order of the users' rows; empty if a run lacks its file."""
    columns = []
    for run in runs:
        path = f"{run.url}/evaluations/{split}.{adjustment}.users.parquet"
        if not storage.exists(path):
            return np.empty(0)
        with storage.open_read(path) as file:
            columns.append(pq.read_table(file, columns=[metric])[metric].to_numpy())
    return np.mean(columns, axis=0) if columns else np.empty(0)


def paired_bootstrap(difference_U: Floats, draws: int = 2000, seed: int = 0) -> float:
    """The two-sided p-value of a mean difference, by resampling users with replacement.

    Args:
        difference_U: ours minus the other's value of the same user, [U].

    Returns:
        Twice the share of resampled means on the far side of 0, at least 2 / (draws + 1).
    """
    generator, users = np.random.default_rng(seed), len(difference_U)
    means = np.empty(draws)
    for index in range(draws):
        means[index] = difference_U[generator.integers(users, size=users)].mean()
    tail = min((means <= 0).sum(), (means >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (draws + 1)))
