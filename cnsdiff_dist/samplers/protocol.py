"""What a negative sampler is: first it names items to look up, then it makes negatives.

Shapes: B rows of this rank, M candidates a row, N negatives a row, D embedding dim;
G rows of a canonical stream in a step (B = groups x G), P vectors in a group's pool.
"""

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch


@dataclass(frozen=True)
class Latents:
    """Encoder outputs of a step's rows, as the objective sees them: the score of a pair is
    their dot product. ``candidates`` are the item rows of ``candidate_BMD``, on the host.
    ``weight`` is 0 for pads; rows lie in ``groups`` of equal size, one per canonical stream.
    ``environment`` is the positive's, int64 [B].
    """

    batch: Batch
    candidates: npt.NDArray[np.int64]
    user_BD: Tensor
    positive_BD: Tensor
    candidate_BMD: Tensor
    environment: Tensor
    weight: Tensor
    groups: int


@dataclass(frozen=True)
class Pool:
    """Negatives that the rows of a group share. ``offset_BP`` is added to their logits: -inf
    leaves a vector out for a row. On cosines the vectors are unit ones. ``item_GP`` as in
    :class:`Negatives`."""

    vector_GPD: Tensor
    offset_BP: Tensor
    item_GP: Tensor | None = None


@dataclass(frozen=True)
class Negatives:
    """Each row's own negatives and, perhaps, a pool shared by its group.

    ``vector_BND`` carries gradient where it comes from the tables; N may be 0 beside a pool.
    ``offset_BN`` is added to the logits: minus the log of how often the sampler draws them.
    ``item_BN`` are their item rows, None for synthetic vectors. ``contrast`` are [B, D] rows
    the contrastive term pushes the positive from; if empty, the first own negative or, without
    one, the group's positives.
    ``hard_BD`` is the synthesised part of a row's negatives, for diagnostics. ``terms`` are
    further losses per row [B], already weighted; ``observed`` values per row [B] worth
    logging, without gradient.
    """

    vector_BND: Tensor
    item_BN: Tensor | None = None
    offset_BN: Tensor | None = None
    pool: Pool | None = None
    contrast: tuple[Tensor, ...] = ()
    hard_BD: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)

    def logits(self, user_BD: Tensor, cosine: bool) -> Tensor:
        """Scores plus offsets of every negative of a row, own first: [B, N + P].

        With ``cosine`` a row's own vectors are brought to length 1, which a mixture of unit
        vectors is not; a pool's are of that length.
        """
        own_BND = functional.normalize(self.vector_BND, dim=-1) if cosine else self.vector_BND
        own_BN = torch.einsum("bd,bnd->bn", user_BD, own_BND)
        if self.offset_BN is not None:
            own_BN = own_BN + self.offset_BN
        if self.pool is None:
            return own_BN
        pool_GPD = self.pool.vector_GPD
        groups = (len(pool_GPD), -1)
        offset, user = self.pool.offset_BP.unflatten(0, groups), user_BD.unflatten(0, groups)
        pool_BP = torch.baddbmm(offset, user, pool_GPD.transpose(1, 2)).flatten(0, 1)
        return torch.cat([own_BN, pool_BP], dim=1) if own_BN.shape[1] else pool_BP


class Sampler(Protocol):
    network: nn.Module | None
    """What the dense engine trains; the trainer puts the engine in its place."""

    def candidates(self, batch: Batch, draws: Draws) -> npt.NDArray[np.int64]:
        """Item rows to encode beside the batch, int64 [B, M], on the host; M may be 0."""
        ...

    def negatives(self, latents: Latents, draws: Draws, progress: float) -> Negatives:
        """Negatives of the rows; ``progress`` runs from 0 to 1 over the training."""
        ...
