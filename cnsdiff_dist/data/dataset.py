"""Read a prepared dataset: its manifest, its evaluation splits and its id maps."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.data.schema import Manifest, Shard, parse_manifest
from cnsdiff_dist.errors import UserError

Ids = npt.NDArray[np.int64]
Side = Literal["users", "items"]
MANIFEST = "manifest.json"


def load_manifest(url: str) -> Manifest:
    """Read the manifest of the dataset directory ``url``.

    Raises:
        UserError: the manifest is missing, cannot be read, or is not a manifest.
    """
    path = storage.join(url, MANIFEST)
    if not storage.exists(path):
        raise UserError(
            f"{storage.display(url)}: no {MANIFEST} here; make a dataset with `cnsdiff prepare`"
        )
    return parse_manifest(storage.read_text(path), storage.display(path))


def read_split(url: str, manifest: Manifest, name: str) -> tuple[Ids, Ids]:
    """Read a whole split into memory; for evaluation splits, since train is streamed.

    Returns:
        The users and the items, int64 [rows] each.

    Raises:
        UserError: the split is absent or empty, or a file is missing, damaged, of another
            length than the manifest says, or holds an id out of range.
    """
    split = manifest.splits.get(name)
    if split is None or split.rows == 0:
        known = ", ".join(key for key, value in manifest.splits.items() if value.rows)
        raise UserError(f"split {name} is not in this dataset; it has {known or 'no rows'}")
    tables = [_read_shard(url, shard, ["user", "item"]) for shard in split.shards]
    for shard, table in zip(split.shards, tables, strict=True):
        for column, limit in (("user", manifest.users), ("item", manifest.items)):
            _check_range(storage.join(url, shard.path), table, column, limit)
    whole = pa.concat_tables(tables)
    return _int64(whole, "user"), _int64(whole, "item")


def read_ids(url: str, manifest: Manifest, side: Side) -> pa.Table:
    """Read the id map of the users or of the items: one line per table row, in row order.

    Returns:
        A table with the columns ``id`` (the raw id, int64 or string), ``row``, ``degree`` (the
        number of train interactions) and, for items, ``environment``.

    Raises:
        UserError: a file is missing or damaged.
    """
    shards = manifest.ids[side].shards
    if not shards:
        raise UserError(f"{storage.display(url)}: no {side} in this dataset")
    return pa.concat_tables([_read_shard(url, shard, None) for shard in shards])


def read_id_blocks(
    url: str, manifest: Manifest, side: Side, rows: range
) -> Iterator[tuple[int, pa.Array]]:
    """Yield the raw ids of a range of table rows as (first row, ids), a file at a time.

    Raises:
        UserError: a file is missing or damaged.
    """
    first = 0
    for shard in manifest.ids[side].shards:
        start, stop = max(rows.start, first), min(rows.stop, first + shard.rows)
        if start < stop:
            ids = _read_shard(url, shard, ["id"])["id"].combine_chunks()
            yield start, ids.slice(start - first, stop - start)
        first += shard.rows


def _read_shard(url: str, shard: Shard, columns: list[str] | None) -> pa.Table:
    path = storage.join(url, shard.path)
    content = storage.read_bytes(path)
    # Checked before Arrow reads it, which some damage in a footer makes abort the process.
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise _damaged(path, "its sha256 is not the manifest's")
    with explained_damage(storage.display(path)):
        file = pq.ParquetFile(pa.BufferReader(content))
        found = file.metadata.num_rows
        if found != shard.rows:  # Checked before all rows are decompressed.
            raise _damaged(path, f"{found} rows, where the manifest promises {shard.rows}")
        table = file.read(columns=columns)
    if table.num_rows != shard.rows:
        raise _damaged(path, f"{table.num_rows} rows, where its footer has {shard.rows}")
    missing = set(columns or []) - set(table.column_names)
    if missing:
        raise _damaged(path, f"no column {missing.pop()}")
    return table


@contextmanager
def explained_damage(where: str) -> Iterator[None]:
    """Turn Arrow's errors about a file's content into a UserError.

    Errors of the disk or the network pass through. ``where`` names the file and, if known, the row
    group.

    Raises:
        UserError: the content is damaged.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: damaged ({reason}); run `cnsdiff prepare` again") from error


def _damaged(path: str, why: str) -> UserError:
    return UserError(f"{storage.display(path)}: damaged ({why}); run `cnsdiff prepare` again")


def _int64(table: pa.Table, column: str) -> Ids:
    return np.asarray(table[column].to_numpy(), np.int64)


def _check_range(path: str, table: pa.Table, column: str, limit: int) -> None:
    if table[column].type != pa.int64() or table[column].null_count:
        raise _damaged(path, f"column {column} is not int64 without nulls")
    values = _int64(table, column)
    if len(values) and (values.min() < 0 or values.max() >= limit):
        worst = values.max() if values.max() >= limit else values.min()
        raise _damaged(path, f"{column} {worst} is not in 0..{limit - 1}")
