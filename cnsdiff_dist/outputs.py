"""What leaves a run: embeddings and top-K lists, as Parquet with raw ids.

Each rank writes its own part; ``_SUCCESS``, a line of JSON, is written last.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

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
from cnsdiff_dist.evaluator import owned, rank, train_interactions
from cnsdiff_dist.trained import Trained

Ids = npt.NDArray[np.int64]
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


def listed_users(model: Trained, file: str | None) -> Ids:
    """The rows of the raw user ids in a text file, ascending, each once; all users without one.

    Raises:
        UserError: a line that is not a user of the dataset.
    """
    users = model.manifest.users
    if file is None:
        return np.arange(users)
    lines = [line.strip() for line in storage.read_text(file).splitlines()]
    numbers = [number for number, line in enumerate(lines, start=1) if line]
    wanted = pa.array([line for line in lines if line], pa.string())
    if not numbers:
        raise UserError(f"{storage.display(file)}: no user ids in it")
    rows = np.full(len(wanted), -1, np.int64)
    for first, ids in read_id_blocks(model.data_url, model.manifest, "users", range(users)):
        place = pc.index_in(wanted, value_set=ids.cast(pa.string()))
        found = place.is_valid().to_numpy(zero_copy_only=False)
        rows[found] = first + place.drop_null().to_numpy()
    for line in np.flatnonzero(rows < 0):
        where = f"{storage.display(file)} line {numbers[line]}"
        raise UserError(f"{where}: {wanted[line].as_py()!r} is not a user of this dataset")
    return np.unique(rows)


def write_recommendations(model: Trained, url: str, users: Ids, k: int) -> int:
    """Columns ``user``, ``item``, ``score``, ``rank``; train items left out. Collective.

    Each rank writes the lists of the users that it owns, as they come.

    Returns:
        rows written by all ranks.
    """
    _begin(model, url)
    manifest, world = model.manifest, model.world
    items = read_ids(model.data_url, manifest, "items")["id"].combine_chunks()
    own, mine = world.own(manifest.users), owned(users, manifest.users, world)
    blocks = [ids for _, ids in read_id_blocks(model.data_url, manifest, "users", own)]
    names = pa.chunked_array(blocks, items.type if not blocks else None).combine_chunks()
    chunk, masks = model.config.evaluation.users_per_chunk, [train_interactions(model.graph)]
    shape, rows = (manifest.users, manifest.items), 0
    with _part(model, url) as write:
        for found in rank(model.user_RD, model.item_RD, mine, masks, k, chunk, shape, world):
            row, column = np.nonzero(np.isfinite(found.scores))
            rows += len(row)
            write(
                pa.table(
                    {
                        "user": names.take(pa.array(found.users[row] - own.start)),
                        "item": items.take(pa.array(found.items[row, column])),
                        "score": found.scores[row, column],
                        "rank": (column + 1).astype(np.int32),
                    }
                )
            )
    total = int(world.sum(torch.tensor([rows], device=world.device)))
    _commit(model, url, {"k": k, "users": len(users), "rows": total})
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
