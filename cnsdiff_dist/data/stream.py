"""Row groups -> batches: projection, checks, read-ahead, and a start at any step."""

import io
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import damage
from cnsdiff_dist.data.epoch_plan import EpochPlan, Rows, first_rows
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, Manifest, Shard, leading_bytes
from cnsdiff_dist.errors import UserError

Pairs = npt.NDArray[np.int64]
"""int64 [2, rows]: user rows, item rows."""
Sides = list[npt.NDArray[np.int64]]
"""The same as two arrays, perhaps views of what was read."""

_AGAIN = "run `cnsdiff prepare` again"
_TRANSFERS = 3  # of the same bytes from a remote store, until a wrong checksum is the store's
_ROW_BYTES, _CHUNK_BYTES = 64, 1 << 20  # a column chunk has no more, decompressed: rows, and pages


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global step, in stream order, on the host.

    ``users`` and ``items`` are int64 [B] with B = len(streams) x width; ``weight`` is
    float32 [B], 0 for the pads that even out the streams. ``valid_rows`` counts the rows
    of the global step that are not pads.
    """

    epoch: int
    step: int
    streams: list[int]
    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    valid_rows: int

    @property
    def width(self) -> int:
        return len(self.users) // len(self.streams)


def read_ahead_threads(url: str) -> int:
    """Threads wait for a remote store, and work on what comes from a local disk."""
    return 8 if not storage.is_local(url) else (os.cpu_count() or 1) + 1


class TrainStream:
    """Reads the train split of a dataset for the streams of one rank.

    Memory is bounded: ``prefetch`` blocks of ``plan.block_rows`` rows per local stream. A row
    group that cannot be read, or not as `prepare` wrote it, stops the job: without its rows the
    global batches would no longer be those of the plan.
    """

    def __init__(
        self, url: str, manifest: Manifest, plan: EpochPlan, streams: list[int], prefetch: int
    ) -> None:
        self._url, self._plan, self._streams, self._prefetch = url, plan, streams, prefetch
        self._shards = [_ShardReader(url, shard, manifest) for shard in manifest.train.shards]
        self._starts = [0, *accumulate(shard.rows for shard in manifest.train.shards)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on.

        Raises:
            UserError: a shard is missing, truncated, not what the manifest says, or holds
                an id out of range, or the store does not answer for longer than
                ``storage.patience``; names the file and the row group.
        """
        threads = min(read_ahead_threads(self._url), len(self._streams) * self._prefetch)
        pool = ThreadPoolExecutor(threads, "read-ahead")
        try:
            feeds = [self._feed(pool, epoch, stream, first_step) for stream in self._streams]
            for step in range(first_step, self._plan.steps):
                yield self._batch(epoch, step, [next(feed) for feed in feeds])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, epoch: int, step: int, parts: list[Pairs]) -> Batch:
        width = min(
            self._plan.rows_per_stream_step,
            self._plan.stream_rows - step * self._plan.rows_per_stream_step,
        )
        weight = np.ones((len(parts), width), np.float32)
        for index, part in enumerate(parts):
            missing = width - part.shape[1]
            if missing:
                weight[index, part.shape[1] :] = 0
                parts[index] = np.pad(part, ((0, 0), (0, missing)))
        users, items = np.concatenate(parts, axis=1)
        valid = self._plan.valid_rows(step)
        return Batch(epoch, step, self._streams, users, items, weight.ravel(), valid)

    def _feed(
        self, pool: ThreadPoolExecutor, epoch: int, stream: int, first_step: int
    ) -> Iterator[Pairs]:
        """The rows a stream gives to each step from ``first_step`` on; fewer at its end."""
        width = self._plan.rows_per_stream_step
        begun = np.empty((2, 0), np.int64)  # a step's rows that the blocks so far did not fill
        for block in self._blocks(pool, epoch, stream, first_step * width):
            need = width - begun.shape[1]
            begun = np.concatenate([begun, block[:, :need]], axis=1)
            if begun.shape[1] < width:
                continue
            yield begun
            whole = need + (block.shape[1] - need) // width * width
            for start in range(need, whole, width):
                yield block[:, start : start + width]
            begun = block[:, whole:]
        yield begun

    def _blocks(
        self, pool: ThreadPoolExecutor, epoch: int, stream: int, skip: int
    ) -> Iterator[Pairs]:
        pending: deque[tuple[Future[Pairs], int]] = deque()
        order = self._plan.row_order(epoch, stream)
        for block in self._plan.blocks(epoch, stream):
            rows = block[1] - block[0]
            if skip >= rows:
                skip -= rows
                continue
            pending.append((pool.submit(self._shuffled_block, block, order), skip))
            skip = 0
            if len(pending) > self._prefetch:
                future, first = pending.popleft()
                yield future.result()[:, first:]
        for future, first in pending:
            yield future.result()[:, first:]

    def _shuffled_block(self, block: tuple[int, int], order: Rows) -> Pairs:
        order = first_rows(order, block[1] - block[0])
        pairs = np.empty((2, len(order)), np.int64)
        for side, ids in enumerate(self.read(*block)):
            # Straight into its place: temporaries of this size cost more than the work.
            np.take(ids, order, out=pairs[side], mode="clip")
        return pairs

    def read(self, start: int, stop: int) -> Sides:
        """Rows [start, stop) of the train split in manifest order."""
        parts: list[Sides] = []
        for shard, first in zip(self._shards, self._starts, strict=False):
            if first < stop and start < first + shard.rows:
                parts += shard.read(max(start - first, 0), min(stop - first, shard.rows))
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate([part[side] for part in parts]) for side in (0, 1)]


class _ShardReader:
    """One Parquet file, its row groups by one range read each; safe for any number of threads."""

    def __init__(self, url: str, shard: Shard, manifest: Manifest) -> None:
        self.rows = shard.rows
        self._url, self._shard = storage.join(url, shard.path), shard
        self._limits = (manifest.users, manifest.items)
        self._starts = [0, *accumulate(shard.row_groups)]
        self._lock, self._footer_wanted = threading.Lock(), False
        self._footer: Future[pq.FileMetaData] = Future()

    def read(self, start: int, stop: int) -> list[Sides]:
        parts = []
        for group, first in enumerate(self._starts[:-1]):
            if first < stop and start < self._starts[group + 1]:
                pairs = self._read_group(group)
                parts.append([ids[max(start - first, 0) : stop - first] for ids in pairs])
        return parts

    def _read_group(self, group: int) -> Sides:
        where = f"{storage.display(self._url)} row group {group}"
        footer, crc32 = self._shared_footer(), self._shard.row_group_crc32[group]
        start, stop = leading_bytes(footer, group)
        data = self._fetch(start, stop, crc32, f"row group {group}")
        span = _Span(data, start, self._shard.bytes)
        with damage(where):
            # The threads of the read-ahead are parallel enough.
            table = pq.ParquetFile(span, metadata=footer).read_row_group(
                group, columns=INTERACTION_SCHEMA.names, use_threads=False
            )
        if any(column.null_count for column in table.columns):
            raise UserError(f"{where}: holds nulls; {_AGAIN}")
        pairs = [column.to_numpy() for column in table.columns]
        check_ids(pairs, self._limits, where)
        return pairs

    def _fetch(self, start: int, stop: int, crc32: int, what: str) -> bytes:
        """Bytes [start, stop) of the file, which are those that `prepare` wrote."""
        for _ in range(1 if storage.is_local(self._url) else _TRANSFERS):
            data = storage.read_range(self._url, start, stop, f"read {what}")
            if zlib.crc32(data) == crc32:
                return data
        raise UserError(
            f"{storage.display(self._url)} {what}: damaged, or changed since (its checksum is not "
            f"the manifest's); {_AGAIN}"
        )

    def _shared_footer(self) -> pq.FileMetaData:
        """Read by the first thread that wants it; the others wait, and share its failure."""
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
        # Checked before Arrow sees it, whose parser can abort the process over a flipped bit.
        start, crc32 = size - self._shard.footer_bytes, self._shard.footer_crc32
        data = self._fetch(start, size, crc32, "footer")
        with damage(f"{where} footer"):
            footer = pq.read_metadata(pa.BufferReader(data))
        check_footer(footer, self._shard, where)
        return footer


class _Span(io.RawIOBase):
    """What Arrow takes for a file of ``size`` bytes, of which only ``data``, at ``start``, is here.

    Reads beyond it come back short, which Arrow reports.
    """

    def __init__(self, data: bytes, start: int, size: int) -> None:
        self._data, self._start, self._size, self._at = memoryview(data), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> memoryview:  # spares a copy
        first = self._at - self._start
        part = self._data[first : first + size] if first >= 0 and size >= 0 else self._data[:0]
        self._at += len(part)
        return part


def check_footer(footer: pq.FileMetaData, shard: Shard, where: str) -> None:
    """Refuse a footer that is not the manifest's, or whose sizes would exhaust the memory.

    Raises:
        UserError: says what differs, or which row group has such sizes.
    """
    found = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
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
    for group, rows in enumerate(found):
        _check_sizes(footer, group, rows, shard.bytes, f"{where} row group {group}")


def _check_sizes(footer: pq.FileMetaData, group: int, rows: int, size: int, where: str) -> None:
    chunks = [footer.row_group(group).column(index) for index in range(len(INTERACTION_SCHEMA))]
    start, stop = leading_bytes(footer, group)
    stored = [chunk.total_compressed_size for chunk in chunks]
    if min(stored) < 0 or start < 4 or stop > size or stop - start != sum(stored):
        raise UserError(f"{where}: damaged (bytes {start}..{stop} of a file of {size}); {_AGAIN}")
    whole = max(chunk.total_uncompressed_size for chunk in chunks)
    if whole > _ROW_BYTES * rows + _CHUNK_BYTES:
        raise UserError(
            f"{where}: damaged (a column of {whole} bytes decompressed, for {rows} rows); {_AGAIN}"
        )


def check_ids(pairs: Sides, limits: tuple[int, int], where: str) -> None:
    """Refuse ids out of range: the tables would train them into some other row.

    Raises:
        UserError: naming the first bad id.
    """
    for ids, name, limit in zip(pairs, INTERACTION_SCHEMA.names, limits, strict=True):
        if len(ids) and (ids.min() < 0 or ids.max() >= limit):
            bad = ids[(ids < 0) | (ids >= limit)][0]
            raise UserError(f"{where}: {name} {bad} is not in 0..{limit - 1}; {_AGAIN}")
