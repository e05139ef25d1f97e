"""What a negative sampler is: first it names items to look up, then it makes negatives.

Shapes: B rows of this rank, M candidates a row, D embedding dim.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.draws import Draws


@dataclass(frozen=True)
class Latents:
    """Encoder outputs of a step's rows. ``weight`` is 0 for pads; rows lie in ``groups``
    of equal size, one per canonical stream. ``environment`` is the positive's, int64 [B].
    """

    user_BD: Tensor
    positive_BD: Tensor
    candidate_BMD: Tensor
    environment: Tensor
    weight: Tensor
    groups: int


@dataclass(frozen=True)
class Negatives:
    """``vector_BD`` goes into the objective, with gradient where it comes from the tables.

    ``terms`` are further losses per row [B], already weighted; ``observed`` are values per
    row [B] worth logging, without gradient.
    """

    vector_BD: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)


class Sampler(Protocol):
    network: nn.Module | None
    """What the dense engine trains; the trainer puts the engine in its place."""

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        """Item rows to encode beside the batch, int64 [B, M], on the host."""
        ...

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        """Negatives of the rows; ``progress`` runs from 0 to 1 over the training."""
        ...
