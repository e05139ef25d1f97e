"""Which rows each canonical stream yields at each step: pure, integers in, arrays out.

The train rows, in manifest order, are cut into C canonical streams of equal length
(some end in one pad). A stream is cut into blocks; its blocks and the rows inside them are
shuffled by (seed, epoch, stream). A global step takes B / C rows from each
stream, and rank r of W serves the streams c with c mod W = r. So the global batches do
not depend on W, every rank has the same number of steps, and the place in an epoch is
just the step.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cnsdiff_dist.errors import UserError

PAD = -1
_PURPOSE = 0  # draws.py has another, so that the two never share a stream
_ROWS = 1  # in a key: not the order of the blocks
ROW_ORDER = 1
"""Another number whenever the same plan yields other rows: an epoch is not resumed across it."""
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochPlan:
    """``rows`` train rows dealt to ``streams``; ``batch`` rows a global step.

    The streams are ``stream_rows`` long; the last step of an epoch may be short, and is
    equally short on every stream.
    """

    rows: int
    batch: int
    streams: int
    block_rows: int
    seed: int

    @property
    def stream_rows(self) -> int:
        return -(-self.rows // self.streams)

    @property
    def rows_per_stream_step(self) -> int:
        return self.batch // self.streams

    @property
    def steps(self) -> int:
        return -(-self.stream_rows // self.rows_per_stream_step)

    def stream_bounds(self, stream: int) -> tuple[int, int]:
        """The [start, stop) of a stream in the sequence of all train rows."""
        return stream * self.rows // self.streams, (stream + 1) * self.rows // self.streams

    def valid_rows(self, step: int) -> int:
        """Rows of a global step that are not pads."""
        start = step * self.rows_per_stream_step
        stop = min(start + self.rows_per_stream_step, self.stream_rows)
        if stop <= self.rows // self.streams:  # no stream is shorter
            return (stop - start) * self.streams
        lengths = [b - a for a, b in map(self.stream_bounds, range(self.streams))]
        return sum(min(stop, length) - start for length in lengths)

    def blocks(self, epoch: int, stream: int) -> list[tuple[int, int]]:
        """The stream's blocks as [start, stop) of train rows, in this epoch's order.

        They are cut at multiples of ``block_rows`` in the sequence of all rows, so that
        with row groups of that size a row group is read by one block only.
        """
        start, stop = self.stream_bounds(stream)
        first = (start // self.block_rows + 1) * self.block_rows
        cuts = [start, *range(first, stop, self.block_rows), stop]
        order = _generator(self.seed, epoch, stream).permutation(len(cuts) - 1)
        return [(cuts[index], cuts[index + 1]) for index in order]

    def row_order(self, epoch: int, stream: int) -> Rows:
        """In which order this epoch takes the rows of each of the stream's blocks, counted from
        the block's first row: int64 [the longest block's rows].

        One for all blocks: a permutation costs half as much as decoding the rows, and the rows
        already lie in a random order.
        """
        longest = min(self.block_rows, self.stream_rows)
        return _generator(self.seed, epoch, stream, _ROWS).permutation(longest)

    def stream_order(self, epoch: int, stream: int) -> Rows:
        """All rows of a stream in this epoch's order, pads last: int64 [stream_rows]."""
        order = self.row_order(epoch, stream)
        blocks = self.blocks(epoch, stream)
        parts = [start + first_rows(order, stop - start) for start, stop in blocks]
        pads = self.stream_rows - sum(map(len, parts))
        return np.concatenate([*parts, np.full(pads, PAD, np.int64)])

    def step_rows(self, epoch: int, step: int, stream: int) -> Rows:
        """The rows a stream gives to a step: int64 [<= B / C]. For tests and tools."""
        width = self.rows_per_stream_step
        return self.stream_order(epoch, stream)[step * width : (step + 1) * width]


def first_rows(order: Rows, count: int) -> Rows:
    """A permutation of all rows of a block, as one of the ``count`` rows of a shorter block."""
    return order if count == len(order) else order[order < count]


def local_streams(streams: int, rank: int, world_size: int) -> list[int]:
    """The streams a rank serves.

    Raises:
        UserError: the world size does not divide the number of streams.
    """
    if streams % world_size:
        fits = [w for w in range(1, streams + 1) if streams % w == 0]
        raise UserError(
            f"a world of {world_size} ranks does not divide data.streams={streams}; "
            f"use a world size in {fits} or another data.streams"
        )
    return list(range(rank, streams, world_size))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((_PURPOSE, *key))))
