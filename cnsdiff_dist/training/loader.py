"""What a step needs besides the parameters, made ahead of it by worker threads.

Which items a sampler looks up and which neighbours are sampled follows from (seed, epoch, step)
and the graph alone, so it overlaps with the steps before. The work is NumPy and Torch on large
arrays, which release the interpreter's lock.

Shapes: B rows of this rank, M candidates of a row.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.config import Config
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch, TrainStream
from cnsdiff_dist.distributed.world import to_device
from cnsdiff_dist.models.lightgcn import Block
from cnsdiff_dist.models.recommender import Recommender
from cnsdiff_dist.samplers.protocol import Sampler

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepInputs:
    """A step's rows and all that follows from them.

    Attributes:
        batch: the rows, on the host.
        draws: the random numbers of the step.
        candidates: item rows that the sampler looks up, int64 [B, M], on the host.
        block: the part of the graph that the batch's users, its items and the candidates need,
            in that order.
        item_B, candidate_BM: item rows of the positives and of the candidates.
        environment_B: popularity bucket of the positive, int64.
        weight_B: 0 for pads, else 1, float32.
    """

    batch: Batch
    draws: Draws
    candidates: Ids
    block: Block
    item_B: Tensor
    candidate_BM: Tensor
    environment_B: Tensor
    weight_B: Tensor

    def to(self, device: torch.device) -> "StepInputs":
        """The same with every tensor on the device. The host does not wait for the copies."""
        return replace(
            self,
            block=self.block.to(device),
            item_B=to_device(self.item_B, device),
            candidate_BM=to_device(self.candidate_BM, device),
            environment_B=to_device(self.environment_B, device),
            weight_B=to_device(self.weight_B, device),
        )


class Loader:
    """Makes the inputs of steps.

    Args:
        environment_of: item rows to popularity buckets, int64 [B] to int64 [B].
    """

    def __init__(
        self,
        config: Config,
        stream: TrainStream,
        sampler: Sampler[Any],
        recommender: Recommender,
        environment_of: Callable[[Ids], Ids],
        device: torch.device,
    ) -> None:
        self._seed, self._workers = config.run.seed, config.data.workers
        self._stream, self._sampler, self._recommender = stream, sampler, recommender
        self._environment_of, self._device = environment_of, device

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[StepInputs]:
        """The inputs of an epoch's steps from ``first_step`` on, each made while the step before
        it runs.

        Raises:
            UserError: as :meth:`TrainStream.batches`.
        """
        pool = ThreadPoolExecutor(self._workers, "sampling")
        pending: deque[Future[StepInputs]] = deque()
        try:
            for batch in self._stream.batches(epoch, first_step):
                pending.append(pool.submit(self.prepare, batch))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, batch: Batch, epoch: int | None = None) -> StepInputs:
        """The inputs of one batch, on the host; ``epoch`` keys the random draws instead of the
        batch's own."""
        key = (self._seed, batch.epoch if epoch is None else epoch, batch.step)
        draws = Draws(key, batch.streams, batch.width, self._device)
        candidates = self._sampler.candidates(batch, draws)
        items = np.concatenate([batch.items, candidates.ravel()])
        return StepInputs(
            batch,
            draws,
            candidates,
            self._recommender.block(batch.users, items, key),
            torch.from_numpy(batch.items),
            torch.from_numpy(candidates),
            torch.from_numpy(self._environment_of(batch.items)),
            torch.from_numpy(batch.weight),
        )
