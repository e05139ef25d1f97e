"""Counter-based randomness: what a row draws depends on (seed, epoch, step, stream) alone.

So no generator state is ever saved, a resumed run repeats the same draws, and the world
size changes nothing: a canonical stream draws the same whichever rank serves it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cnsdiff_dist.distributed.world import to_device

_PURPOSE = 1  # the epoch plan has another, so that the two never share a stream


class Draws:
    """The random numbers of one step, for the rows of the local streams.

    Rows come in stream order, ``width`` rows a stream, so B = streams x width. The methods
    consume the streams' generators: the order of calls is part of the result.
    """

    def __init__(
        self, key: tuple[int, int, int], streams: list[int], width: int, device: torch.device
    ) -> None:
        self._width, self._device = width, device
        seeds = [np.random.SeedSequence((_PURPOSE, *key, stream)) for stream in streams]
        self._generators = [np.random.Generator(np.random.Philox(seed)) for seed in seeds]
        # torch draws normals four times faster; always on the host, so that a GPU run
        # draws what a CPU run draws.
        self._normals = [
            torch.Generator().manual_seed(int(seed.generate_state(1, np.uint64)[0]))
            for seed in seeds
        ]

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """U[0, 1) on the host, float64 [B, count]."""
        return np.concatenate([g.random((self._width, count)) for g in self._generators])

    def normal(self, dim: int) -> Tensor:
        """N(0, 1), float32 [B, dim] on the device."""
        parts = [torch.randn(self._width, dim, generator=g) for g in self._normals]
        return to_device(torch.cat(parts), self._device)

    def integers(self, high: int) -> Tensor:
        """Uniform over 0..high-1, int64 [B] on the device."""
        parts = [g.integers(high, size=self._width) for g in self._generators]
        return to_device(torch.from_numpy(np.concatenate(parts)), self._device)

    def beta(self, a: float, b: float) -> Tensor:
        """Beta(a, b), float32 [B] on the device."""
        parts = [g.beta(a, b, self._width) for g in self._generators]
        drawn = np.concatenate(parts).astype(np.float32)
        return to_device(torch.from_numpy(drawn), self._device)
