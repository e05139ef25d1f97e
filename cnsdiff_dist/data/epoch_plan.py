"""Which train rows each canonical stream yields at each step: pure functions of integers.

The train rows, in manifest order, are cut into canonical streams of equal length; some streams
end in one pad. A stream is cut into blocks. Its blocks, and the rows inside them, are shuffled by
(seed, epoch, stream). A global step takes the same number of rows from each stream, and a rank
serves every stream whose number modulo the world size is the rank.

Hence the global batches do not depend on the world size, all ranks have the same number of steps,
and the position in an epoch is just the step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.errors import UserError

PAD = -1
_PURPOSE = 0  # draws and neighbours have others, so that no two share random numbers.
_ROWS = 1  # Ends the key of a row order; the key of a block order is shorter.
ROW_ORDER = 1
"""A version of the row order: it changes when the same plan yields other rows.

An epoch is not resumed across versions.
"""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """How the train rows are dealt to canonical streams and steps.

    The last step of an epoch may be short; it is equally short on every stream.

    Attributes:
        rows: the number of train rows.
        batch: rows of a global step, a multiple of ``streams``.
        streams: the number of canonical streams.
        block_rows: rows of a block that is shuffled in memory.
    """

    rows: int
    batch: int
    streams: int
    block_rows: int
    seed: int

    @property
    def stream_rows(self) -> int:
        """Rows of a stream, pads included."""
        return -(-self.rows // self.streams)

    @property
    def rows_per_stream_step(self) -> int:
        return self.batch // self.streams

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.stream_rows // self.rows_per_stream_step)

    def stream_bounds(self, stream: int) -> tuple[int, int]:
        """Return the [start, stop) of a stream among all train rows."""
        return stream * self.rows // self.streams, (stream + 1) * self.rows // self.streams

    def valid_rows(self, step: int) -> int:
        """Count the rows of a global step that are not pads."""
        start = step * self.rows_per_stream_step
        stop = min(start + self.rows_per_stream_step, self.stream_rows)
        if stop <= self.rows // self.streams:  # No stream is shorter.
            return (stop - start) * self.streams
        lengths = [b - a for a, b in map(self.stream_bounds, range(self.streams))]
        return sum(min(stop, length) - start for length in lengths)

    def blocks(self, epoch: int, stream: int) -> list[tuple[int, int]]:
        """Return the stream's blocks as [start, stop) of train rows, in this epoch's order.

        Blocks are cut at multiples of ``block_rows`` among all rows. If row groups have that
        size, only one block reads a row group.
        """
        start, stop = self.stream_bounds(stream)
        first = (start // self.block_rows + 1) * self.block_rows
        cuts = [start, *range(first, stop, self.block_rows), stop]
        order = _generator(self.seed, epoch, stream).permutation(len(cuts) - 1)
        return [(cuts[index], cuts[index + 1]) for index in order]

    def row_order(self, epoch: int, stream: int) -> Rows:
        """Return this epoch's order of the rows in each of the stream's blocks.

        All blocks share it, because a permutation costs half as much as decoding the rows, and
        `prepare` has already shuffled the rows.

        Returns:
            Row numbers that count from a block's first row, int64 [rows of the longest block].
        """
        longest = min(self.block_rows, self.stream_rows)
        return _generator(self.seed, epoch, stream, _ROWS).permutation(longest)

    def stream_order(self, epoch: int, stream: int) -> Rows:
        """Return all rows of a stream in this epoch's order, pads last: int64 [stream_rows]."""
        order = self.row_order(epoch, stream)
        blocks = self.blocks(epoch, stream)
        parts = [start + first_rows(order, stop - start) for start, stop in blocks]
        pads = self.stream_rows - sum(map(len, parts))
        return np.concatenate([*parts, np.full(pads, PAD, np.int64)])

    def step_rows(self, epoch: int, step: int, stream: int) -> Rows:
        """Return the rows that a stream gives to a step, pads included; for tests and tools.

        int64 [rows_per_stream_step], or fewer in the last step.
        """
        width = self.rows_per_stream_step
        return self.stream_order(epoch, stream)[step * width : (step + 1) * width]


def first_rows(order: Rows, count: int) -> Rows:
    """Restrict the row order of a block to the first ``count`` rows, for a shorter block."""
    return order if count == len(order) else order[order < count]


def local_streams(streams: int, rank: int, world_size: int) -> list[int]:
    """Return the streams that a rank serves.

    Raises:
        UserError: the world size does not divide the number of streams.
    """
    if streams % world_size:
        fits = [size for size in range(1, streams + 1) if streams % size == 0]
        raise UserError(
            f"a world of {world_size} ranks does not divide data.streams={streams}; "
            f"use a world size in {fits} or another data.streams"
        )
    return list(range(rank, streams, world_size))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((_PURPOSE, *key))))
