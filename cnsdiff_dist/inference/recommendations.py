"""Top-K lists of users as Parquet, with raw ids.

Shapes: n listed users, K length of a list.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from cnsdiff_dist.data.dataset import read_ids
from cnsdiff_dist.evaluation.evaluator import train_interactions
from cnsdiff_dist.evaluation.top_k import ExactSearch, Search, TopKLists, top_k_lists, users_of_rank
from cnsdiff_dist.inference.faiss_search import ApproximateSearch, recall_sums
from cnsdiff_dist.inference.listed_users import Listed, all_users
from cnsdiff_dist.inference.output_directory import (
    begin_output,
    commit_output,
    open_part,
    refuse_other_files,
)
from cnsdiff_dist.inference.trained_model import TrainedModel

Ids = npt.NDArray[np.int64]
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_SAMPLE = 512  # users, of all ranks, on whom an approximate search is tried


def write_recommendations(
    model: TrainedModel,
    url: str,
    listed: Listed | None,
    k: int,
    alpha: float = 0.0,
    wanted: float | None = None,
) -> dict[str, float]:
    """Write the K best items of each user: columns ``user``, ``item``, ``score`` and ``rank``.

    Train items of a user are left out, except for users who share a table row, since the row does
    not say whose they are. Each rank writes the lists of the users that it owns. Collective.

    Args:
        listed: whom to write lists for; None for all users.
        alpha: the adjustment that the model's vectors have, for the record.
        wanted: with it, an index finds this share of the exact lists' items.

    Returns:
        What ``_SUCCESS`` holds: ``k``, ``alpha``, ``users``, the ``rows`` of all ranks and, of an
        index, ``recall``, the share of the exact lists' items that it finds, and ``scores_all``,
        the number of ranks on which it does not pay, so that they score every item.
    """
    refuse_other_files(model.run.world, url)
    run, manifest, world = model.run, model.run.manifest, model.run.world
    exact = ExactSearch(
        model.item_RD,
        world.own_rows(manifest.items),
        [train_interactions(run.graph)],
        min(k, manifest.items),
        masked_users=manifest.users - manifest.hashed_users,
    )
    search, record = (exact, {}) if wanted is None else _tuned(model, exact, wanted)
    count = len(listed.rows) if listed else manifest.users
    listed = listed or all_users(run)
    begin_output(world, url)
    written = _write_lists(model, url, listed, search)
    total = int(world.sum(torch.tensor([written], device=world.device)))
    record = {"k": k, "alpha": alpha, "users": count, "rows": total, **record}
    commit_output(world, url, {"step": model.step, **record})
    return record


def _write_lists(model: TrainedModel, url: str, listed: Listed, search: Search) -> int:
    """Write this rank's part, and return how many rows it has."""
    run, manifest, world = model.run, model.run.manifest, model.run.world
    items = read_ids(run.data_url, manifest, "items")["id"].combine_chunks()
    mine = users_of_rank(np.unique(listed.rows), manifest.users, world)
    chunk, written = run.config.evaluation.users_per_chunk, 0
    with open_part(world, url) as write:
        for found in top_k_lists(model.user_RD, mine, search, chunk, manifest.users, world):
            for table in _as_tables(listed, found, items, chunk):
                write(table)
                written += len(table)
    return written


def _tuned(
    model: TrainedModel, exact: ExactSearch, wanted: float
) -> tuple[ApproximateSearch, dict[str, float]]:
    """An index that is tuned on some users and measured on others."""
    search, world, users = (
        ApproximateSearch(exact, wanted),
        model.run.world,
        model.run.manifest.users,
    )
    own, step = world.own_rows(users), max(users // (2 * _SAMPLE), 1)
    some = np.arange(own.start, own.stop, step)
    _lists(model, some[::2], search.tune)
    sums = recall_sums(*(_lists(model, some[1::2], each) for each in (search, exact)))
    counts = torch.tensor([*sums, int(search.scores_all)], device=world.device)
    hits, of, scores_all = world.sum(counts).tolist()
    return search, {"recall": hits / of if of else 1.0, "scores_all": scores_all}


def _lists(model: TrainedModel, users: Ids, search: Search) -> Ids:
    """The items of these users' lists, -1 where a list has no more."""
    count, world = model.run.manifest.users, model.run.world
    ranked = top_k_lists(model.user_RD, users, search, 2 * _SAMPLE, count, world)
    lists = [np.where(np.isfinite(found.scores), found.items, -1) for found in ranked]
    return np.concatenate(lists) if lists else np.empty((0, 0), np.int64)


def _as_tables(listed: Listed, found: TopKLists, items: pa.Array, size: int) -> Iterator[pa.Table]:
    """The lists of a chunk of table rows, ``size`` listed users at a time: many may share one
    row."""
    first, stop = (np.searchsorted(listed.rows, found.users, side) for side in _SIDES)
    row_n = np.repeat(np.arange(len(first)), stop - first)  # in the chunk, of each listed user
    user_n = first[row_n] + np.arange(len(row_n)) - np.searchsorted(row_n, row_n)
    for start in range(0, len(row_n), size):
        some = row_n[start : start + size]
        user, column = np.nonzero(np.isfinite(found.scores[some]))
        row = some[user]
        columns = {
            "user": listed.names.take(pa.array(user_n[start + user])),
            "item": items.take(pa.array(found.items[row, column])),
            "score": found.scores[row, column],
            "rank": (column + 1).astype(np.int32),
        }
        yield pa.table(columns)
