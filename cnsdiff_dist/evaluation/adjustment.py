"""Popularity put back into the score: s(u, i) + alpha log p_env(i) (backdoor adjustment).

A debiasing objective learns log p(i|u) / p(i). This module adds the popularity of the environment
where the lists will be shown, as one more dimension of the vectors: the adjusted score stays a
dot product, and an index over the vectors still serves it.

Shapes: U users, I items, R items that this rank owns, D embedding dimension.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import read_ids
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError

Floats = npt.NDArray[np.float64]
_FILE = "calibration.json"
_FINEST_STEP = 1 / 16  # of the search for alpha


@dataclass(frozen=True)
class Calibration:
    """What ``cnsdiff calibrate`` found for the checkpoint at ``step``.

    ``exposure`` is the URL of the exposure table, None for the train split. ``curve`` has one
    entry per alpha tried: ``alpha`` and ``metrics``.
    """

    alpha: float
    split: str
    metric: str
    step: int
    exposure: str | None
    curve: list[dict[str, Any]]


def adjusted(
    user_UD: Tensor, item_ID: Tensor, alpha: float, log_p_I: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Vectors [U, D + 1] and [I, D + 1] whose dot product is s(u, i) + alpha log p(i).

    Any subset of users and items will do. The vectors are unchanged if alpha is 0 or p is None.
    """
    if alpha == 0 or log_p_I is None:
        return user_UD, item_ID
    one_U1 = torch.ones_like(user_UD[:, :1])
    return torch.cat([user_UD, one_U1], 1), torch.cat([item_ID, alpha * log_p_I[:, None]], 1)


def log_p_train(graph: GraphArrays, world: World) -> Tensor:
    """log p(i) of the train split with add-one smoothing, float32 [R]."""
    own = world.own_rows(graph.items)
    degree = graph.item_degree(np.arange(own.start, own.stop))
    return _smoothed_log_share(degree, len(graph.user_items), graph.items)


def log_p_exposure(url: str, data_url: str, manifest: Manifest, world: World) -> Tensor:
    """log p(i) of an exposure table with add-one smoothing, float32 [R].

    Args:
        url: a Parquet or CSV table with columns ``item`` (raw id) and ``weight`` >= 0.

    Raises:
        UserError: the table cannot be read, lacks a column, has a weight that is no number or an
            id that is not an item of the dataset.
    """
    where = storage.display(url)
    raw_ids, weights = _read_exposure(url)
    ids = read_ids(data_url, manifest, "items")["id"].to_pylist()
    row_of = {str(identity): row for row, identity in enumerate(ids)}
    counts_I = np.zeros(manifest.items)
    for line, (identity, weight) in enumerate(zip(raw_ids, weights, strict=True), start=1):
        if identity not in row_of:
            raise UserError(f"{where} row {line}: {identity!r} is not an item of this dataset")
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{where} row {line}: weight {weight} is not a number of 0 or more")
        counts_I[row_of[identity]] += weight
    own = world.own_rows(manifest.items)
    return _smoothed_log_share(counts_I[own.start : own.stop], float(counts_I.sum()), len(counts_I))


def _read_exposure(url: str) -> tuple[list[str], Floats]:
    try:
        with storage.open_read(url) as file:
            read = pq.read_table if url.endswith(".parquet") else pyarrow.csv.read_csv
            table = read(file)
        raw_ids = [str(value) for value in table["item"].to_pylist()]
        return raw_ids, table["weight"].cast(pa.float64()).to_numpy()
    except (pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        where = storage.display(url)
        raise UserError(f"{where}: not a table of item and weight: {reason}") from None


def _smoothed_log_share(counts_R: npt.NDArray[Any], total: float, items: int) -> Tensor:
    return torch.from_numpy(np.log((counts_R + 1) / (total + items))).float()


def fit_alpha(
    evaluate: Callable[[float], dict[str, float]], metric: str, grid: list[float]
) -> tuple[float, list[dict[str, Any]]]:
    """Find the alpha with the best ``metric``: try a grid, then halve the step around its best.

    Args:
        evaluate: the metrics under an alpha.

    Returns:
        The best alpha, of equals the one nearest to 0, and the curve by ascending alpha.
    """
    found: dict[float, dict[str, float]] = {}

    def best_with(alphas: list[float]) -> float:
        found.update({a: evaluate(a) for a in alphas if a not in found})
        return max(found, key=lambda a: (found[a][metric], -abs(a), a))

    best = best_with(sorted(set(grid)))
    step = min((b - a for a, b in zip(sorted(grid), sorted(grid)[1:])), default=0.0) / 2
    while step >= _FINEST_STEP:
        best = best_with([best - step, best + step])
        step /= 2
    return best, [{"alpha": a, "metrics": found[a]} for a in sorted(found)]


def write_calibration(run_url: str, calibration: Calibration) -> None:
    storage.write_json(f"{run_url}/{_FILE}", asdict(calibration))


def read_calibration(run_url: str, step: int) -> Calibration | None:
    """The calibration of the run's checkpoint at ``step``; None if the run has no calibration.

    Raises:
        UserError: it belongs to another checkpoint, or is damaged.
    """
    path = f"{run_url}/{_FILE}"
    if not storage.exists(path):
        return None
    where = storage.display(path)
    try:
        found = Calibration(**json.loads(storage.read_text(path)))
        fits = found.step == step and math.isfinite(found.alpha)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{where}: damaged; calibrate again") from None
    if not fits:
        raise UserError(f"{where}: of step {found.step}, the best is now {step}; calibrate again")
    return found
