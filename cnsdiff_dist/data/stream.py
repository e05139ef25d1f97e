"""Stream the train split as batches: shuffled, read ahead, and from any step of an epoch on.

The epoch plan says which rows a step takes. Per local stream, threads read the blocks of the plan
ahead (``_blocks``), the blocks are cut into the rows of each step (``_steps``), and the rows of all
local streams are joined to the batch of this rank (``batches``).
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from cnsdiff_dist import storage
from cnsdiff_dist.data.epoch_plan import EpochPlan, Rows, first_rows
from cnsdiff_dist.data.schema import Manifest
from cnsdiff_dist.data.shard_reader import Columns, ShardReader

Pairs = npt.NDArray[np.int64]
"""int64 [2, rows]: users, items."""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global step, in stream order, on the host.

    Shapes: B = G x W, with G = len(streams) groups of W = width rows.

    Attributes:
        streams: the canonical streams that this rank serves.
        users: table rows, int64 [B].
        items: table rows, int64 [B].
        weight: float32 [B], 0 for the pads that even out the streams and else 1.
        valid_rows: how many rows of the global step, on all ranks, are not pads.
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
        """Rows of a group, W."""
        return len(self.users) // len(self.streams)


def read_ahead_threads(url: str) -> int:
    """Return how many threads read ahead from the dataset at ``url``.

    The threads mostly wait if the store is remote, and keep the cores busy if the disk is local.
    """
    return 8 if not storage.is_local(url) else (os.cpu_count() or 1) + 1


class TrainStream:
    """Reads the train split of a dataset for the streams of one rank.

    Per local stream it reads ``prefetch`` blocks of ``plan.block_rows`` rows ahead, which bounds
    the memory. A row group that cannot be read, or is not as `prepare` wrote it, stops the job,
    because without its rows the global batches would not be those of the plan.
    """

    def __init__(
        self, url: str, manifest: Manifest, plan: EpochPlan, streams: list[int], prefetch: int
    ) -> None:
        self._url, self._plan, self._streams, self._prefetch = url, plan, streams, prefetch
        self._shards = [ShardReader(url, shard, manifest) for shard in manifest.train.shards]
        self._starts = [0, *accumulate(shard.rows for shard in manifest.train.shards)]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from ``first_step`` on.

        Raises:
            UserError: a shard is missing, truncated, not what the manifest says, or holds
                an id out of range, or the store does not answer for longer than
                ``storage.patience``; the message names the file and the row group.
        """
        threads = min(read_ahead_threads(self._url), len(self._streams) * self._prefetch)
        pool = ThreadPoolExecutor(threads, "read-ahead")
        try:
            feeds = [self._steps(pool, epoch, stream, first_step) for stream in self._streams]
            for step in range(first_step, self._plan.steps):
                yield self._batch(epoch, step, [next(feed) for feed in feeds])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, epoch: int, step: int, parts: list[Pairs]) -> Batch:
        """Join the rows of each local stream, padded to equal length."""
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

    def _steps(
        self, pool: ThreadPoolExecutor, epoch: int, stream: int, first_step: int
    ) -> Iterator[Pairs]:
        """Yield the rows of a stream for each step from ``first_step`` on; at its end, fewer."""
        width = self._plan.rows_per_stream_step
        begun = np.empty((2, 0), np.int64)  # the rows of a step that the blocks so far do not fill
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
        """Yield the shuffled blocks of a stream, less its first ``skip`` rows, read ahead."""
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
            # Written in place, since temporaries of this size cost more than the work.
            np.take(ids, order, out=pairs[side], mode="clip")
        return pairs

    def read(self, start: int, stop: int) -> Columns:
        """Read rows [start, stop) of the train split in manifest order."""
        parts: list[Columns] = []
        for shard, first in zip(self._shards, self._starts, strict=False):
            if first < stop and start < first + shard.rows:
                parts += shard.read(max(start - first, 0), min(stop - first, shard.rows))
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate([part[side] for part in parts]) for side in (0, 1)]
