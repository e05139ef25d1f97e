"""Read row groups of a train shard by byte range, and check every byte against the manifest."""

import io
import os
import threading
import zlib
from concurrent.futures import Future
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import explained_damage
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, Manifest, Shard, leading_bytes
from cnsdiff_dist.errors import UserError

Columns = list[npt.NDArray[np.int64]]
"""[users, items] of some rows, int64 [rows] each, perhaps views of what was read."""

_AGAIN = "run `cnsdiff prepare` again"
# A wrong checksum of a remote read may be an error of the transfer, until it repeats this often.
_TRANSFERS = 3
# The bound on a decompressed column chunk: so many bytes per row, and so many for its pages.
_ROW_BYTES, _CHUNK_BYTES = 64, 1 << 20


class ShardReader:
    """Reads one Parquet file of the train split, with one range read per row group.

    Any number of threads may use it.
    """

    def __init__(self, url: str, shard: Shard, manifest: Manifest) -> None:
        self.rows = shard.rows
        self._url, self._shard = storage.join(url, shard.path), shard
        self._limits = (manifest.users, manifest.items)
        self._starts = [0, *accumulate(shard.row_groups)]
        self._lock, self._footer_wanted = threading.Lock(), False
        self._footer: Future[pq.FileMetaData] = Future()

    def read(self, start: int, stop: int) -> list[Columns]:
        """Read rows [start, stop) of the file, in one part per row group.

        Raises:
            UserError: the file is missing, truncated, not what the manifest says, or holds an id
                out of range; the message names the file and the row group.
        """
        parts = []
        for row_group, first in enumerate(self._starts[:-1]):
            if first < stop and start < self._starts[row_group + 1]:
                columns = self._read_row_group(row_group)
                parts.append([ids[max(start - first, 0) : stop - first] for ids in columns])
        return parts

    def _read_row_group(self, row_group: int) -> Columns:
        where = f"{storage.display(self._url)} row group {row_group}"
        footer, crc32 = self._shared_footer(), self._shard.row_group_crc32[row_group]
        start, stop = leading_bytes(footer, row_group)
        data = self._fetch(start, stop, crc32, f"row group {row_group}")
        with explained_damage(where):
            # The threads of the read-ahead are parallel enough, so Arrow starts none.
            table = pq.ParquetFile(
                _PartialFile(data, start, self._shard.bytes), metadata=footer
            ).read_row_group(row_group, columns=INTERACTION_SCHEMA.names, use_threads=False)
        if any(column.null_count for column in table.columns):
            raise UserError(f"{where}: holds nulls; {_AGAIN}")
        columns = [column.to_numpy() for column in table.columns]
        _check_ids(columns, self._limits, where)
        return columns

    def _fetch(self, start: int, stop: int, crc32: int, what: str) -> bytes:
        """Read bytes [start, stop) of the file, and check that `prepare` wrote them."""
        for _ in range(1 if storage.is_local(self._url) else _TRANSFERS):
            data = storage.read_range(self._url, start, stop, f"read {what}")
            if zlib.crc32(data) == crc32:
                return data
        raise UserError(
            f"{storage.display(self._url)} {what}: damaged, or changed since (its checksum is not "
            f"the manifest's); {_AGAIN}"
        )

    def _shared_footer(self) -> pq.FileMetaData:
        """Read the footer in the first thread that asks; the others wait for it or its failure."""
        with self._lock:
            first, self._footer_wanted = not self._footer_wanted, True
        if first:
            try:
                self._footer.set_result(self._read_footer())
            except BaseException as error:
                self._footer.set_exception(error)
        return self._footer.result()

    def _read_footer(self) -> pq.FileMetaData:
        where, size = storage.display(self._url), storage.size(self._url)
        if size != self._shard.bytes:
            raise UserError(
                f"{where}: {size} bytes where the manifest has {self._shard.bytes}: truncated, or "
                f"changed since; {_AGAIN}"
            )
        # Checked before Arrow reads it, whose parser can abort the process over a flipped bit.
        start, crc32 = size - self._shard.footer_bytes, self._shard.footer_crc32
        data = self._fetch(start, size, crc32, "footer")
        with explained_damage(f"{where} footer"):
            footer = pq.read_metadata(pa.BufferReader(data))
        _check_footer(footer, self._shard, where)
        return footer


class _PartialFile(io.RawIOBase):
    """A file of ``size`` bytes for Arrow, of which only ``data``, at offset ``start``, is here.

    A read beyond ``data`` comes back short, which Arrow reports.
    """

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._offset = memoryview(data), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origins = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}
        self._offset = offset + origins[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def read(self, size: int = -1) -> memoryview:
        # RawIOBase would copy what readinto() fills; a view of the data costs nothing.
        first = self._offset - self._start
        part = self._data[first : first + size] if first >= 0 and size >= 0 else self._data[:0]
        self._offset += len(part)
        return part


def _check_footer(footer: pq.FileMetaData, shard: Shard, where: str) -> None:
    """Refuse a footer that is not the manifest's, or whose sizes would exhaust the memory."""
    found = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
    if found != shard.row_groups:
        raise UserError(
            f"{where}: row groups of {found[:4]} rows where the manifest has "
            f"{shard.row_groups[:4]}: it changed since; {_AGAIN}"
        )
    schema = footer.schema.to_arrow_schema()
    for index, field in enumerate(INTERACTION_SCHEMA):
        if schema.names[index : index + 1] != [field.name] or schema.types[index] != field.type:
            raise UserError(
                f"{where}: no {field.type} column {field.name!r} at {index} in {schema.names}; "
                f"{_AGAIN}"
            )
    for index, rows in enumerate(found):
        _check_sizes(footer, index, rows, shard.bytes, f"{where} row group {index}")


def _check_sizes(
    footer: pq.FileMetaData, row_group: int, rows: int, file_bytes: int, where: str
) -> None:
    metadata = footer.row_group(row_group)
    chunks = [metadata.column(index) for index in range(len(INTERACTION_SCHEMA))]
    start, stop = leading_bytes(footer, row_group)
    stored = [chunk.total_compressed_size for chunk in chunks]
    if min(stored) < 0 or start < 4 or stop > file_bytes or stop - start != sum(stored):
        raise UserError(
            f"{where}: damaged (bytes {start}..{stop} of a file of {file_bytes}); {_AGAIN}"
        )
    decompressed = max(chunk.total_uncompressed_size for chunk in chunks)
    if decompressed > _ROW_BYTES * rows + _CHUNK_BYTES:
        raise UserError(
            f"{where}: damaged (a column of {decompressed} bytes decompressed, for {rows} rows); "
            f"{_AGAIN}"
        )


def _check_ids(columns: Columns, limits: tuple[int, int], where: str) -> None:
    """Refuse ids out of range, which would train some other row of the tables."""
    for ids, name, limit in zip(columns, INTERACTION_SCHEMA.names, limits, strict=True):
        if len(ids) and (ids.min() < 0 or ids.max() >= limit):
            bad = ids[(ids < 0) | (ids >= limit)][0]
            raise UserError(f"{where}: {name} {bad} is not in 0..{limit - 1}; {_AGAIN}")
