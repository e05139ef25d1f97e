"""What a step needs besides the parameters, made ahead of it by worker threads.

Which items a sampler looks up, which neighbours are sampled: all of it follows from (seed,
epoch, step) and the graph, so it overlaps with the steps before. The work is NumPy and Torch on
large arrays, which let go of the interpreter's lock.

Shapes: B rows of this rank, M candidates a row.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch, TrainStream
from cnsdiff_dist.models.lightgcn import Block
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.samplers.protocol import Sampler


@dataclass(frozen=True)
class Ready:
    """A step's rows, the sampler's ``candidates`` int64 [B, M], and the block of the graph, on
    the host, that the batch's users, its items and the candidates (in that order) need."""

    batch: Batch
    draws: Draws
    candidates: npt.NDArray[np.int64]
    block: Block


class Loader:
    def __init__(
        self, config: Config, stream: TrainStream, sampler: Sampler, recommender: Recommender,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._seed, self._workers = config.run.seed, config.data.workers
        self._stream, self._sampler = stream, sampler
        self._recommender, self._device = recommender, device

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[Ready]:
        """The steps of an epoch from ``first_step`` on, each made while the one before runs.

        Raises:
            UserError: as :meth:`TrainStream.batches`.
        """
        pool = ThreadPoolExecutor(self._workers, "sampling")
        pending: deque[Future[Ready]] = deque()
        try:
            for batch in self._stream.batches(epoch, first_step):
                pending.append(pool.submit(self.prepare, batch))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, batch: Batch, epoch: int | None = None) -> Ready:
        """``epoch`` keys the random draws; by default it is the batch's."""
        key = (self._seed, batch.epoch if epoch is None else epoch, batch.step)
        draws = Draws(key, batch.streams, batch.width, self._device)
        candidates = self._sampler.candidates(batch, draws)
        items = np.concatenate([batch.items, candidates.ravel()])
        block = self._recommender.block(batch.users, items, key)
        return Ready(batch, draws, candidates, block)
