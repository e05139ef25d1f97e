"""Counter-based random numbers: what a row draws depends on (seed, epoch, step, stream) alone.

No generator state is saved, a resumed run repeats its draws, and the world size changes nothing,
because a canonical stream draws the same numbers on whichever rank serves it.

Shapes: B rows of the batch on this rank, G groups (the local streams), W rows of a group.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.distributed.world import to_device

_PURPOSE = 1  # epoch_plan and neighbours have others, so that no two share random numbers.


class Draws:
    """The random numbers of one step for the rows of the local streams.

    Every stream has its own generator, which the methods advance, so the order of calls is part
    of the result.

    Args:
        key: (seed, epoch, step).
        streams: the G canonical streams that this rank serves. Rows are in stream order.
        width: W, so that B = G x W.
    """

    def __init__(
        self, key: tuple[int, int, int], streams: list[int], width: int, device: torch.device
    ) -> None:
        self._width, self._device = width, device
        seeds = [np.random.SeedSequence((_PURPOSE, *key, stream)) for stream in streams]
        self._generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        # torch draws normals four times faster than NumPy. It draws on the host, so that a GPU
        # run draws what a CPU run draws.
        self._normals = [
            torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0]))
            for seed in seeds
        ]

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Draw from U[0, 1): float64 [B, count] on the host."""
        return np.concatenate([g.random((self._width, count)) for g in self._generators])

    def normal(self, dim: int) -> Tensor:
        """Draw from N(0, 1): float32 [B, dim] on the device."""
        parts = [torch.randn(self._width, dim, generator=g) for g in self._normals]
        return to_device(torch.cat(parts), self._device)

    def integers(self, high: int) -> Tensor:
        """Draw uniformly from 0..high-1: int64 [B] on the device."""
        parts = [g.integers(high, size=self._width) for g in self._generators]
        return to_device(torch.from_numpy(np.concatenate(parts)), self._device)

    def beta(self, a: float, b: float) -> Tensor:
        """Draw from Beta(a, b): float32 [B] on the device."""
        parts = [g.beta(a, b, self._width) for g in self._generators]
        drawn = np.concatenate(parts).astype(np.float32)
        return to_device(torch.from_numpy(drawn), self._device)
