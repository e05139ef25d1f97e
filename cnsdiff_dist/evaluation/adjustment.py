"""The environment put back at scoring: s(u, i) + alpha log p_env(i) (backdoor adjustment).

An objective that takes popularity out learns log p(i|u) / p(i); the environment in which lists
will be shown comes back as one more dimension of the vectors, so that the same dot product,
and any index built on it, serves the adjusted score.

Shapes: U users, I items, D embedding dim, R this rank's own items.
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

Counts = npt.NDArray[np.float64]
_FILE = "calibration.json"
_REFINED = 1 / 16  # the step of the last search


@dataclass(frozen=True)
class Calibration:
    """What ``cnsdiff calibrate`` found; ``exposure`` is the URL of the table, None for train.

    ``curve`` has one entry per alpha tried: ``alpha`` and ``metrics``.
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
    """[U, D + 1] and [I, D + 1] whose dot product is s(u, i) + alpha log p(i), of any users and
    items; as they are for alpha 0 or without p."""
    if alpha == 0 or log_p_I is None:
        return user_UD, item_ID
    one_U1 = torch.ones_like(user_UD[:, :1])
    return torch.cat([user_UD, one_U1], 1), torch.cat([item_ID, alpha * log_p_I[:, None]], 1)


def log_p_train(graph: GraphArrays, world: World) -> Tensor:
    """log p(i) of the train split, each item counted once more than it occurs, float32 [R]."""
    own = world.own(graph.items)
    degree = graph.item_degree(np.arange(own.start, own.stop))
    return _log_share(degree, len(graph.user_items), graph.items)


def log_p_exposure(url: str, data_url: str, manifest: Manifest, world: World) -> Tensor:
    """The same of a Parquet or CSV table with columns ``item`` (raw id) and ``weight`` >= 0.

    Raises:
        UserError: it cannot be read, lacks a column, has a weight that is no number or an id
            that is not an item of the dataset.
    """
    where = storage.display(url)
    try:
        with storage.open_read(url) as file:
            read = pq.read_table if url.endswith(".parquet") else pyarrow.csv.read_csv
            table = read(file)
        raw = [str(value) for value in table["item"].to_pylist()]
        weight = table["weight"].cast(pa.float64()).to_numpy()
    except (pa.ArrowException, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a table of item and weight: {reason}") from None
    ids = read_ids(data_url, manifest, "items")["id"].to_pylist()
    row_of = {str(identity): row for row, identity in enumerate(ids)}
    counts = np.zeros(manifest.items)
    for line, (identity, value) in enumerate(zip(raw, weight, strict=True), start=1):
        if identity not in row_of:
            raise UserError(f"{where} row {line}: {identity!r} is not an item of this dataset")
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{where} row {line}: weight {value} is not a number of 0 or more")
        counts[row_of[identity]] += value
    own = world.own(manifest.items)
    return _log_share(counts[own.start : own.stop], float(counts.sum()), manifest.items)


def _log_share(counts: Counts, total: float, items: int) -> Tensor:
    return torch.from_numpy(np.log((counts + 1) / (total + items))).float()


def fit_alpha(
    evaluate: Callable[[float], dict[str, float]], metric: str, grid: list[float]
) -> tuple[float, list[dict[str, Any]]]:
    """The alpha with the best ``metric``: a grid, then halving steps around its best.

    Of equals the one nearest to 0. Returns it and the curve, by ascending alpha.
    """
    found: dict[float, dict[str, float]] = {}

    def look(alphas: list[float]) -> float:
        found.update({a: evaluate(a) for a in alphas if a not in found})
        return max(found, key=lambda a: (found[a][metric], -abs(a), a))

    best = look(sorted(set(grid)))
    step = min((b - a for a, b in zip(sorted(grid), sorted(grid)[1:])), default=0.0) / 2
    while step >= _REFINED:
        best = look([best - step, best + step])
        step /= 2
    return best, [{"alpha": a, "metrics": found[a]} for a in sorted(found)]


def write_calibration(run_url: str, calibration: Calibration) -> None:
    storage.write_json(f"{run_url}/{_FILE}", asdict(calibration))


def read_calibration(run_url: str, step: int) -> Calibration | None:
    """The calibration of a run's checkpoint, None if it has none.

    Raises:
        UserError: it is of another checkpoint, or damaged.
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
