"""Row groups -> batches: projection, checks, read-ahead, and a start at any step."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from cnsdiff_dist import storage
from cnsdiff_dist.data.dataset import damage
from cnsdiff_dist.data.plan import EpochPlan
from cnsdiff_dist.data.schema import INTERACTION_SCHEMA, Manifest, Shard
from cnsdiff_dist.errors import UserError

Pairs = npt.NDArray[np.int64]
"""int64 [2, rows]: user rows, item rows."""
Sides = list[npt.NDArray[np.int64]]
"""The same as two arrays, perhaps views of what was read."""


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


class TrainStream:
    """Reads the train split of a dataset for the streams of one rank.

    Memory is bounded: ``prefetch`` blocks of ``plan.block_rows`` rows per local stream.
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
                an id out of range; names the file and the row group.
        """
        # Threads wait for a remote store, and work on what comes from a local disk.
        threads = 8 if not storage.is_local(self._url) else (os.cpu_count() or 1) + 1
        pool = ThreadPoolExecutor(min(threads, len(self._streams) * self._prefetch), "read-ahead")
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
        users, items = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        valid = self._plan.valid_rows(step)
        return Batch(epoch, step, self._streams, users, items, weight.ravel(), valid)

    def _feed(
        self, pool: ThreadPoolExecutor, epoch: int, stream: int, first_step: int
    ) -> Iterator[Pairs]:
        """The rows a stream gives to each step from ``first_step`` on; fewer at its end."""
        width = self._plan.rows_per_stream_step
        rest = np.empty((2, 0), np.int64)
        for block in self._blocks(pool, epoch, stream, first_step * width):
            rest = np.concatenate([rest, block], axis=1) if rest.shape[1] else block
            whole = rest.shape[1] // width * width
            for start in range(0, whole, width):
                yield rest[:, start : start + width]
            rest = rest[:, whole:]
        yield rest

    def _blocks(
        self, pool: ThreadPoolExecutor, epoch: int, stream: int, skip: int
    ) -> Iterator[Pairs]:
        pending: deque[tuple[Future[Pairs], int]] = deque()
        for block in self._plan.blocks(epoch, stream):
            rows = block[1] - block[0]
            if skip >= rows:
                skip -= rows
                continue
            pending.append((pool.submit(self._shuffled_block, epoch, stream, block), skip))
            skip = 0
            if len(pending) > self._prefetch:
                future, first = pending.popleft()
                yield future.result()[:, first:]
        for future, first in pending:
            yield future.result()[:, first:]

    def _shuffled_block(self, epoch: int, stream: int, block: tuple[int, int]) -> Pairs:
        order = self._plan.order_in_block(epoch, stream, block)
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
    """One Parquet file, its row groups by range; the footer is read once.

    A ParquetFile is not safe for two readers: each thread takes an idle one, or opens another.
    """

    def __init__(self, url: str, shard: Shard, manifest: Manifest) -> None:
        self.rows = shard.rows
        self._url = storage.join(url, shard.path)
        self._groups, self._limits = shard.row_groups, (manifest.users, manifest.items)
        self._starts = [0, *accumulate(shard.row_groups)]
        self._idle: deque[pq.ParquetFile] = deque()
        self._footer: pq.FileMetaData | None = None

    def read(self, start: int, stop: int) -> list[Sides]:
        parts = []
        for group, first in enumerate(self._starts[:-1]):
            if first < stop and start < self._starts[group + 1]:
                pairs = self._read_group(group)
                parts.append([ids[max(start - first, 0) : stop - first] for ids in pairs])
        return parts

    def _read_group(self, group: int) -> Sides:
        where = f"{storage.display(self._url)} row group {group}"
        try:
            file = self._idle.pop()
        except IndexError:
            file = self._open()
        with storage.explained(self._url, f"read row group {group} of"), damage(where):
            # The threads of the read-ahead are parallel enough.
            table = file.read_row_group(group, columns=INTERACTION_SCHEMA.names, use_threads=False)
        self._idle.append(file)
        if any(column.null_count for column in table.columns):
            raise UserError(f"{where}: holds nulls; run `cnsdiff prepare` again")
        pairs = [column.to_numpy() for column in table.columns]
        check_ids(pairs, self._limits, where)
        return pairs

    def _open(self) -> pq.ParquetFile:
        where = storage.display(self._url)
        with storage.explained(self._url, "read"), damage(f"{where}: not a whole Parquet file"):
            local = storage.is_local(self._url)
            file = pq.ParquetFile(
                # By its path, Arrow reads a local file without Python in between.
                storage.local_path(self._url) if local else storage.open_read(self._url),
                metadata=self._footer, pre_buffer=not local, page_checksum_verification=True,
            )  # fmt: skip
        found = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if found != self._groups:
            raise UserError(
                f"{where}: row groups of {found[:4]} rows where the manifest has "
                f"{self._groups[:4]}: it changed since; run `cnsdiff prepare` again"
            )
        schema = file.schema_arrow
        for field in INTERACTION_SCHEMA:
            if field.name not in schema.names or schema.field(field.name).type != field.type:
                raise UserError(f"{where}: no {field.type} column {field.name!r} in {schema.names}")
        self._footer = file.metadata
        return file


def check_ids(pairs: Sides, limits: tuple[int, int], where: str) -> None:
    """Refuse ids out of range: the tables would train them into some other row.

    Raises:
        UserError: naming the first bad id.
    """
    for ids, name, limit in zip(pairs, INTERACTION_SCHEMA.names, limits, strict=True):
        if len(ids) and (ids.min() < 0 or ids.max() >= limit):
            bad = ids[(ids < 0) | (ids >= limit)][0]
            raise UserError(f"{where}: {name} {bad} is not in 0..{limit - 1}; prepare again")
