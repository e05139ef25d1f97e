"""What a negative sampler is: it names items to look up, then makes negatives of their vectors.

Shapes: B rows of this rank, M candidates of a row, N negatives of its own, D embedding dimension;
G groups of W rows each (B = G x W), one per canonical stream; P vectors in a group's pool.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import World

Ids = npt.NDArray[np.int64]
SettingsT = TypeVar("SettingsT", bound=sections.Negatives)


@dataclass(frozen=True)
class EncodedBatch:
    """A step's rows after the encoder; the dot product of two vectors is their score.

    Attributes:
        batch: the rows, on the host.
        candidates: item rows of ``candidate_BMD``, int64 [B, M], on the host.
        user_BD, positive_BD, candidate_BMD: vectors, with gradient into the tables.
        positive_item_B, candidate_item_BM: the item rows of the vectors, on the device.
        environment_B: popularity bucket of the positive, int64.
        weight_B: 0 for the pads that even out the streams, else 1.
        groups: G; the rows of a group lie one after the other.
    """

    batch: Batch
    candidates: Ids
    user_BD: Tensor
    positive_BD: Tensor
    candidate_BMD: Tensor
    positive_item_B: Tensor
    candidate_item_BM: Tensor
    environment_B: Tensor
    weight_B: Tensor
    groups: int

    def by_group(self, rows_B: Tensor) -> Tensor:
        """The same rows as [G, W, ...]."""
        return rows_B.unflatten(0, (self.groups, -1))


@dataclass(frozen=True)
class Pool:
    """Negatives that the rows of a group share.

    Attributes:
        vector_GPD: on cosines, of length 1.
        offset_BP: added to the logits; -inf leaves a vector out of a row.
        item_GP: their item rows, None for a pool that holds synthetic vectors.
    """

    vector_GPD: Tensor
    offset_BP: Tensor
    item_GP: Tensor | None = None


@dataclass(frozen=True)
class Negatives:
    """A row's own negatives and, perhaps, a pool that it shares with its group.

    Attributes:
        vector_BND: with gradient where it comes from the tables; N may be 0 beside a pool.
        item_BN: their item rows, None for synthetic vectors.
        offset_BN: added to the logits: minus the log of how often the sampler draws an item.
        contrast: [B, D] each, from which the contrastive term pushes the positive away; if
            there are none it takes the first own negative or, without one, the positives of the
            group.
        hard_BD: the synthesised part of the negatives, for diagnostics.
        terms: further losses per row, [B], already weighted.
        observed: values per row, [B], to be logged, without gradient.
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
        """Scores plus offsets of every negative of a row, its own first: [B, N + P].

        With ``cosine`` a row's own vectors are normalised here, since a mixture of unit vectors
        is shorter than 1; the vectors of a pool have length 1 already.
        """
        own_BND = functional.normalize(self.vector_BND, dim=-1) if cosine else self.vector_BND
        own_BN = torch.einsum("bd,bnd->bn", user_BD, own_BND)
        if self.offset_BN is not None:
            own_BN = own_BN + self.offset_BN
        if self.pool is None:
            return own_BN
        pool_GPD = self.pool.vector_GPD
        by_group = (len(pool_GPD), -1)
        offset_GWP = self.pool.offset_BP.unflatten(0, by_group)
        user_GWD = user_BD.unflatten(0, by_group)
        pool_BP = torch.baddbmm(offset_GWP, user_GWD, pool_GPD.transpose(1, 2)).flatten(0, 1)
        return torch.cat([own_BN, pool_BP], dim=1) if own_BN.shape[1] else pool_BP


@dataclass(frozen=True)
class Footprint:
    """What the negatives of one row cost; ``cnsdiff plan`` counts memory and time with it.

    Attributes:
        candidates: M, item rows that are looked up and encoded for the row.
        own: N, its own negatives.
        pool: P, vectors that it shares with its group; 0 without a pool.
    """

    candidates: int
    own: int
    pool: int = 0


@dataclass(frozen=True)
class Surroundings:
    """What a sampler may use besides its own settings.

    Attributes:
        environments: E, popularity buckets of the dataset.
        dim: D.
        cosine: whether scores are cosines.
        seed: of the run.
    """

    graph: GraphArrays
    world: World
    environments: int
    dim: int
    cosine: bool
    seed: int
    generator: sections.Generator
    loss: sections.Loss


class Sampler(ABC, Generic[SettingsT]):
    """One way to make negatives; ``negatives.kind`` names it.

    To add one, write a file beside this one and list its class in ``registry.py``.
    """

    settings_type: ClassVar[type[sections.Negatives]]
    """The keys of this kind; its ``kind`` has a default."""

    def __init__(self, settings: SettingsT, around: Surroundings) -> None:
        self.settings, self.graph = settings, around.graph
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(around.seed)
            # The training step puts the dense engine, which trains it, in its place.
            self.network = self.make_network(around.generator, around.dim, around.environments)

    @classmethod
    def make_network(
        cls, generator: sections.Generator, dim: int, environments: int
    ) -> nn.Module | None:
        """The network that is trained with the tables; None of a sampler without one."""
        return None

    @classmethod
    @abstractmethod
    def footprint(cls, settings: SettingsT, generator: sections.Generator, width: int) -> Footprint:
        """What a row costs in groups of ``width`` rows, W."""

    @abstractmethod
    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        """Item rows to encode beside the batch, int64 [B, M], on the host; M may be 0."""

    @abstractmethod
    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        """Negatives of the rows; ``progress`` runs from 0 to 1 over the training."""


def no_candidates(batch: Batch) -> Ids:
    """[B, 0], of a sampler that looks nothing up."""
    return np.empty((len(batch.users), 0), np.int64)
