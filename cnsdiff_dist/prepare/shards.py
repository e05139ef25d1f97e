"""Write the Parquet shards of a dataset, and describe files for its manifest."""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist.data.schema import Blob, Shard, Split, leading_bytes

ROW_GROUP = 65_536
"""Rows of a row group."""
SHARD_ROWS = 128 * ROW_GROUP


def write_split(root: Path, folder: str, rows: pa.RecordBatchReader) -> Split:
    """Write a stream of rows as ``folder/part-NNNNN.parquet`` under ``root``.

    Every row group but the last has ROW_GROUP rows, so that a reader can fetch blocks of rows.
    """
    shards: list[Shard] = []
    row_groups = _regrouped(rows)
    for first in row_groups:
        path = f"{folder}/part-{len(shards):05d}.parquet"
        of_shard = chain([first], islice(row_groups, SHARD_ROWS // ROW_GROUP - 1))
        shards.append(_write_shard(root, path, rows.schema, of_shard))
    return Split(rows=sum(shard.rows for shard in shards), shards=shards)


def _write_shard(root: Path, path: str, schema: pa.Schema, row_groups: Iterable[pa.Table]) -> Shard:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes: list[int] = []
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=ROW_GROUP)
            sizes.append(table.num_rows)
    blob = describe(root, path).model_dump()
    return Shard(**blob, **_checksums(file), rows=sum(sizes), row_groups=sizes)


def _regrouped(rows: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield the same rows in tables of exactly ROW_GROUP rows; the last may be shorter."""
    waiting: list[pa.RecordBatch] = []
    for batch in rows:
        waiting.append(batch)
        while sum(map(len, waiting)) >= ROW_GROUP:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, ROW_GROUP)
            waiting = table.slice(ROW_GROUP).to_batches()
    if sum(map(len, waiting)):
        yield pa.Table.from_batches(waiting)


def _checksums(path: Path) -> dict[str, Any]:
    """Read back a Parquet file for the checksums of its parts, by their names in `Shard`."""
    footer = pq.read_metadata(path)
    footer_bytes = footer.serialized_size + 8  # Its length and the magic follow it.
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        return {
            "row_group_crc32": [
                _crc32(file, *leading_bytes(footer, row_group))
                for row_group in range(footer.num_row_groups)
            ],
            "footer_bytes": footer_bytes,
            "footer_crc32": _crc32(file, end - footer_bytes, end),
        }


def _crc32(file: IO[bytes], start: int, stop: int) -> int:
    file.seek(start)
    return zlib.crc32(file.read(stop - start))


def describe(root: Path, path: str) -> Blob:
    """Measure the file ``path`` under ``root``: its size and sha256."""
    with (root / path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Blob(path=path, bytes=(root / path).stat().st_size, sha256=digest)
