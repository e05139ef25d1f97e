"""What leaves a run: embeddings and top-K lists, as Parquet with raw ids.

Each rank writes its own part; ``_SUCCESS``, a line of JSON, is written last.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cnsdiff_dist import storage
from cnsdiff_dist.approximate import ApproximateSearch, recall_sums
from cnsdiff_dist.data.dataset import Side, read_id_blocks, read_ids
from cnsdiff_dist.data.hashed import hashed_row
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluator import ExactSearch, Search, owned, rank, train_interactions
from cnsdiff_dist.trained import Trained

Ids = npt.NDArray[np.int64]
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as it is written in a log
_SAMPLE = 512  # users, of all ranks, on whom an approximate search is tried
_DONE = "_SUCCESS"  # readers of a Parquet directory skip names with an underscore
_PART = re.compile(r"((users|items)/)?part-\d{5}\.parquet")


def write_embeddings(model: Trained, url: str, alpha: float = 0.0) -> None:
    """Columns ``id`` and ``embedding`` (fixed-size list of float32) per side. Collective.

    Each rank writes the rows that it owns, a block at a time.
    """
    _begin(model, url)
    sides: tuple[tuple[Side, Tensor], ...] = (("users", model.user_RD), ("items", model.item_RD))
    for side, table_RD in sides:
        own = model.world.own(model.manifest.ids[side].rows)
        with _part(model, f"{url}/{side}") as write:
            for first, ids in read_id_blocks(model.data_url, model.manifest, side, own):
                rows_RD = table_RD[first - own.start :][: len(ids)].float().cpu()
                flat = pa.array(rows_RD.numpy().ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, rows_RD.shape[1])
                write(pa.table({"id": ids, "embedding": vectors}))
    counts = {"users": model.manifest.users, "items": model.manifest.items}
    _commit(model, url, {"dim": model.user_RD.shape[1], "alpha": alpha, **counts})


@dataclass(frozen=True)
class Listed:
    """Whom lists are for: table rows, int64 [n] ascending, and raw ids [n]. Users that share a row
    are listed with it one after the other; ``hashed`` of them have none of their own."""

    rows: Ids
    names: pa.Array
    hashed: int


def listed_users(model: Trained, file: str) -> Listed:
    """The users of a text file with a raw id on each line.

    Raises:
        UserError: a line that is not a user of the dataset, unless it has rows for such users.
    """
    lines = [line.strip() for line in storage.read_text(file).splitlines()]
    wanted = list(dict.fromkeys(line for line in lines if line))
    if not wanted:
        raise UserError(f"{storage.display(file)}: no user ids in it")
    names, users = pa.array(wanted, pa.string()), model.manifest.users
    rows, kind = np.full(len(names), -1, np.int64), names.type
    for first, ids in read_id_blocks(model.data_url, model.manifest, "users", range(users)):
        place, kind = pc.index_in(names, value_set=ids.cast(pa.string())), ids.type
        found = place.is_valid().to_numpy(zero_copy_only=False)
        rows[found] = first + place.drop_null().to_numpy()
    unknown = np.flatnonzero(rows < 0)
    for index in unknown:
        name = wanted[index]
        if not model.manifest.hashed_users or (kind == pa.int64() and not _INTEGER.fullmatch(name)):
            where = f"{storage.display(file)} line {lines.index(name) + 1}"
            raise UserError(f"{where}: {name[:40]!r} is not a user of this dataset")
        rows[index] = hashed_row(name, model.manifest)
    order = np.argsort(rows, kind="stable")
    return Listed(rows[order], names.take(pa.array(order)).cast(kind), len(unknown))


def make_search(model: Trained, k: int, wanted: float | None) -> tuple[Search, dict[str, float]]:
    """Of the K best items, train items masked: all of them, or the ``wanted`` share, for which an
    index is tuned on some users. Collective.

    Returns:
        the search, and what a reader should know of it: ``k``, and for an index ``recall``, the
        share of the exact lists' items that it finds for other users.
    """
    own, world = model.world.own(model.manifest.items), model.world
    masks = [train_interactions(model.graph)]
    exact = ExactSearch(model.item_RD, own, masks, min(k, model.manifest.items))
    if wanted is None:
        return exact, {"k": k}
    search, mine = ApproximateSearch(exact, wanted), world.own(model.manifest.users)
    step = max(model.manifest.users // _SAMPLE, 1)
    some, others = (np.arange(mine.start + at, mine.stop, step) for at in (0, step // 2))
    _lists(model, some, search.tune)
    sums = recall_sums(_lists(model, others, search), _lists(model, others, exact))
    hits, of = world.sum(torch.tensor(sums, device=world.device)).tolist()
    return search, {"k": k, "recall": hits / max(of, 1)}


def _lists(model: Trained, users: Ids, search: Search) -> Ids:
    """The items of these users' lists, -1 where there is none."""
    ranked = rank(model.user_RD, users, search, _SAMPLE, model.manifest.users, model.world)
    lists = [np.where(np.isfinite(found.scores), found.items, -1) for found in ranked]
    return np.concatenate(lists) if lists else np.empty((0, 0), np.int64)


def write_recommendations(
    model: Trained, url: str, listed: Listed | None, search: Search, record: dict[str, float]
) -> int:
    """Columns ``user``, ``item``, ``score``, ``rank`` of what ``search`` finds; of all users
    unless some are ``listed``. Collective.

    Each rank writes the lists of the users that it owns, as they come; ``record`` goes into
    ``_SUCCESS``.

    Returns:
        rows written by all ranks.
    """
    _begin(model, url)
    manifest, world = model.manifest, model.world
    items = read_ids(model.data_url, manifest, "items")["id"].combine_chunks()
    count = len(listed.rows) if listed else manifest.users
    if listed is None:
        own = world.own(manifest.users)
        blocks = [ids for _, ids in read_id_blocks(model.data_url, manifest, "users", own)]
        names = pa.chunked_array(blocks, items.type if not blocks else None).combine_chunks()
        listed = Listed(np.arange(own.start, own.stop), names, 0)
    mine = owned(np.unique(listed.rows), manifest.users, world)
    chunk, written = model.config.evaluation.users_per_chunk, 0
    with _part(model, url) as write:
        for found in rank(model.user_RD, mine, search, chunk, manifest.users, world):
            first, stop = (np.searchsorted(listed.rows, found.users, side) for side in _SIDES)
            list_N = np.repeat(np.arange(len(first)), stop - first)  # whose list a user has
            user_N = first[list_N] + np.arange(len(list_N)) - np.searchsorted(list_N, list_N)
            row, column = np.nonzero(np.isfinite(found.scores[list_N]))
            written += len(row)
            write(
                pa.table(
                    {
                        "user": listed.names.take(pa.array(user_N[row])),
                        "item": items.take(pa.array(found.items[list_N[row], column])),
                        "score": found.scores[list_N[row], column],
                        "rank": (column + 1).astype(np.int32),
                    }
                )
            )
    total = int(world.sum(torch.tensor([written], device=world.device)))
    _commit(model, url, {**record, "users": count, "rows": total})
    return total


def _begin(model: Trained, url: str) -> None:
    """Remove an older output of ours, its ``_SUCCESS`` first; refuse to touch anything else.

    Raises:
        UserError: ``url`` holds other files.
    """
    if model.world.is_main:
        found = storage.list_files(url)
        foreign = [name for name in found if name != _DONE and not _PART.fullmatch(name)]
        if foreign:
            raise UserError(
                f"{storage.display(url)}: holds other files ({foreign[0]}); "
                "choose an empty directory"
            )
        for name in sorted(found, key=lambda name: name != _DONE):
            storage.delete_tree(f"{url}/{name}")
    model.world.barrier()


@contextmanager
def _part(model: Trained, url: str) -> Iterator[Callable[[pa.Table], None]]:
    """This rank's file, written table by table; it appears whole, or, without a row, not at all."""
    with ExitStack() as stack:
        writer: pq.ParquetWriter | None = None

        def write(table: pa.Table) -> None:
            nonlocal writer
            if writer is None and len(table):
                path = f"{url}/part-{model.world.rank:05d}.parquet"
                file = stack.enter_context(storage.open_write(path))
                writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
            if writer is not None:
                writer.write_table(table)

        yield write


def _commit(model: Trained, url: str, record: dict[str, float]) -> None:
    model.world.barrier()
    if model.world.is_main:
        text = json.dumps({"step": model.step, **record})
        storage.write_text(f"{url}/{_DONE}", text + "\n")
    model.world.barrier()
