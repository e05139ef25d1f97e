"""What leaves a run: embeddings and top-K lists, as Parquet with raw ids.

Each rank writes its own part; ``_SUCCESS``, a line of JSON, is written last. Until then there is
``_INCOMPLETE``, and so there is where a process was killed: what lies there is replaced.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from cnsdiff_dist.data.dataset import Side, read_id_blocks, read_ids
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.evaluator import train_interactions
from cnsdiff_dist.evaluation.top_k import ExactSearch, Ranked, Search, owned, rank
from cnsdiff_dist.inference.faiss_search import ApproximateSearch, recall_sums
from cnsdiff_dist.inference.trained_model import Trained
from cnsdiff_dist.prepare.hashed_users import hashed_row

Ids = npt.NDArray[np.int64]
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,18}")  # as it is written in a log
_SAMPLE = 512  # users, of all ranks, on whom an approximate search is tried
# Readers of a Parquet directory skip names with an underscore or a dot.
_DONE, _BEGUN = "_SUCCESS", "_INCOMPLETE"
_PART = re.compile(r"((users|items)/)?(part-\d{5}\.parquet|\.part-\d{5}\.parquet\.\w+)")
_MARK = re.compile(rf"{_DONE}|{_BEGUN}|\.({_DONE}|{_BEGUN})\.\w+")


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
    # Not splitlines: an id may have one of Unicode's other line ends.
    text = storage.read_text(file).removeprefix("\ufeff")
    lines = [line.strip() for line in text.split("\n")]
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
        if not model.manifest.hashed_users or (kind == pa.int64() and not _is_int64(name)):
            where = f"{storage.display(file)} line {lines.index(name) + 1}"
            if not model.manifest.hashed_users:
                what = "`cnsdiff prepare --hashed-users` makes a dataset for those who come later"
            else:
                what = "its ids are integers"
            raise UserError(f"{where}: {name[:40]!r} is not a user of this dataset; {what}")
        rows[index] = hashed_row(name, model.manifest)
    order = np.argsort(rows, kind="stable")
    return Listed(rows[order], names.take(pa.array(order)).cast(kind), len(unknown))


def _is_int64(name: str) -> bool:
    return bool(_INTEGER.fullmatch(name)) and -(2**63) <= int(name) < 2**63


def write_recommendations(
    model: Trained, url: str, listed: Listed | None, k: int, alpha: float = 0.0,
    wanted: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Columns ``user``, ``item``, ``score``, ``rank`` of the K best items of all users, unless some
    are ``listed``; train items left out, but of users that share a row: it does not say whose they
    are. Collective.

    With ``wanted`` an index finds that share of them. Each rank writes the lists of the users
    that it owns, as they come.

    Returns:
        what ``_SUCCESS`` holds: ``k``, ``alpha``, ``users``, ``rows`` of all ranks, and of an index
        ``recall``, the share of the exact lists' items that it finds, and ``scores_all``, on how
        many ranks it does not pay, so that every item is scored.
    """
    _refuse_others(model, url)
    manifest, world = model.manifest, model.world
    exact = ExactSearch(
        model.item_RD, world.own(manifest.items), [train_interactions(model.graph)],
        min(k, manifest.items), masking=manifest.users - manifest.hashed_users,
    )  # fmt: skip
    search, record = (exact, {}) if wanted is None else _tuned(model, exact, wanted)
    count = len(listed.rows) if listed else manifest.users
    listed = listed or _all_users(model)
    items = read_ids(model.data_url, manifest, "items")["id"].combine_chunks()
    mine = owned(np.unique(listed.rows), manifest.users, world)
    chunk, written = model.config.evaluation.users_per_chunk, 0
    _begin(model, url)
    with _part(model, url) as write:
        for found in rank(model.user_RD, mine, search, chunk, manifest.users, world):
            for table in _tables(listed, found, items, chunk):
                write(table)
                written += len(table)
    total = int(world.sum(torch.tensor([written], device=world.device)))
    record = {"k": k, "alpha": alpha, "users": count, "rows": total, **record}
    _commit(model, url, record)
    return record


def _tuned(
    model: Trained, exact: ExactSearch, wanted: float
) -> tuple[ApproximateSearch, dict[str, float]]:
    """An index, tuned on some users and measured on others."""
    search, world = ApproximateSearch(exact, wanted), model.world
    own = world.own(model.manifest.users)
    step = max(model.manifest.users // (2 * _SAMPLE), 1)
    some = np.arange(own.start, own.stop, step)
    _lists(model, some[::2], search.tune)
    sums = recall_sums(*(_lists(model, some[1::2], each) for each in (search, exact)))
    counts = torch.tensor([*sums, int(search.scores_all)], device=world.device)
    hits, of, scores_all = world.sum(counts).tolist()
    return search, {"recall": hits / of if of else 1.0, "scores_all": scores_all}


def _lists(model: Trained, users: Ids, search: Search) -> Ids:
    """The items of these users' lists, -1 where there is none."""
    ranked = rank(model.user_RD, users, search, 2 * _SAMPLE, model.manifest.users, model.world)
    lists = [np.where(np.isfinite(found.scores), found.items, -1) for found in ranked]
    return np.concatenate(lists) if lists else np.empty((0, 0), np.int64)


def _all_users(model: Trained) -> Listed:
    """Those that this rank owns."""
    own = model.world.own(model.manifest.users)
    blocks = [ids for _, ids in read_id_blocks(model.data_url, model.manifest, "users", own)]
    names = pa.chunked_array(blocks, None if blocks else pa.string()).combine_chunks()
    return Listed(np.arange(own.start, own.stop), names, 0)


def _tables(listed: Listed, found: Ranked, items: pa.Array, size: int) -> Iterator[pa.Table]:
    """The lists of a chunk, ``size`` users at a time: many may share one of its rows."""
    first, stop = (np.searchsorted(listed.rows, found.users, side) for side in _SIDES)
    row_N = np.repeat(np.arange(len(first)), stop - first)  # in the chunk, of each listed user
    user_N = first[row_N] + np.arange(len(row_N)) - np.searchsorted(row_N, row_N)
    for start in range(0, len(row_N), size):
        row_n = row_N[start : start + size]
        user, column = np.nonzero(np.isfinite(found.scores[row_n]))
        row = row_n[user]
        yield pa.table(
            {
                "user": listed.names.take(pa.array(user_N[start + user])),
                "item": items.take(pa.array(found.items[row, column])),
                "score": found.scores[row, column],
                "rank": (column + 1).astype(np.int32),
            }
        )


def _refuse_others(model: Trained, url: str) -> list[str]:
    """What lies there, which is of an older output of ours; on rank 0.

    Raises:
        UserError: it is anything else, such as a dataset, whose files have names like ours.
    """
    found = storage.list_files(url) if model.world.is_main else []
    parts = [name for name in found if not _MARK.fullmatch(name)]
    ours = _BEGUN in found or (_DONE in found and _is_ours(url))
    foreign = [name for name in parts if not ours or not _PART.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{storage.display(url)}: holds other files ({foreign[0]}); choose an empty directory"
        )
    return found


def _is_ours(url: str) -> bool:
    try:
        return "step" in json.loads(storage.read_text(f"{url}/{_DONE}"))
    except (ValueError, TypeError):
        return False


def _begin(model: Trained, url: str) -> None:
    """Remove an older output of ours, its ``_SUCCESS`` first.

    Raises:
        UserError: ``url`` holds other files.
    """
    found = _refuse_others(model, url)
    if model.world.is_main:
        storage.write_text(f"{url}/{_BEGUN}", "")
        for name in sorted(set(found) - {_BEGUN}, key=lambda name: name != _DONE):
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
        with suppress(UserError):  # a store may let nothing be deleted; _SUCCESS is what counts
            storage.delete_tree(f"{url}/{_BEGUN}")
    model.world.barrier()
