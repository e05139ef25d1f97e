"""In-batch negatives: the other positives of the group, drawn by popularity as they come.

Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019: with ``log_q`` the logit of j loses log(W q(j)), q(j) = degree(j) / edges being how
often j is somebody's positive; without it the softmax learns log p(j|u) / p(j), popularity taken
out. The paper takes log q(j) from the positive's logit too, which a sampler cannot do; the W, the
size of the pool, makes up for it: the sum over the pool then estimates that over the catalogue.

Mixed: Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in
Recommendations", WWW 2020: uniform negatives join the pool. With ``log_q`` each loses the log of
the expected number of times that it occurs among a row's negatives, from either source.
"""

from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.distributed.world import to_device
from cnsdiff_dist.samplers.candidates import uniform_candidates
from cnsdiff_dist.samplers.pools import KnownPositives, batch_offsets
from cnsdiff_dist.samplers.protocol import (
    EncodedBatch,
    Footprint,
    Ids,
    Negatives,
    Pool,
    Sampler,
    Surroundings,
    no_candidates,
)


class PositivesSettings(sections.Negatives):
    log_q: bool = Field(False, description="subtract log q(i) from the logits")


class InBatchSettings(PositivesSettings):
    kind: Literal["in_batch"] = "in_batch"


class MixedSettings(PositivesSettings):
    kind: Literal["mixed"] = "mixed"
    count: int = Field(1, ge=1, description="uniform negatives of a row beside its pool")


PositivesSettingsT = TypeVar("PositivesSettingsT", bound=PositivesSettings)


class PositivesSampler(Sampler[PositivesSettingsT]):
    """The group's positives as a pool, beside ``uniform_count`` uniform negatives of a row."""

    uniform_count = 0

    def __init__(self, settings: PositivesSettingsT, around: Surroundings) -> None:
        super().__init__(settings, around)
        self._known, self._degree = KnownPositives(self.graph), np.diff(self.graph.item_indptr)
        self._items, self._edges = len(self._degree), max(len(self.graph.user_items), 1)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        offset_BW, offset_BN = batch_offsets(self._known, encoded), None
        item_GW = encoded.by_group(encoded.positive_item_B)
        if self.settings.log_q:
            width = item_GW.shape[1]
            expected_B = self._log_expected(encoded.batch.items, width, offset_BW)
            expected_GW = encoded.by_group(expected_B)
            offset_BW = offset_BW - expected_GW.repeat_interleave(width, dim=0)
            offset_BN = -self._log_expected(encoded.candidates, width, offset_BW)
        pool = Pool(encoded.by_group(encoded.positive_BD), offset_BW, item_GW)
        return Negatives(encoded.candidate_BMD, encoded.candidate_item_BM, offset_BN, pool)

    def _log_expected(self, items: Ids, width: int, like: Tensor) -> Tensor:
        """The log of how often each item is expected among a row's negatives."""
        q = self._degree[items] / self._edges
        expected = q * width + self.uniform_count / self._items
        log = np.log(np.maximum(expected, 1e-12)).astype(np.float32)
        return to_device(torch.from_numpy(log), like.device)


class InBatchSampler(PositivesSampler[InBatchSettings]):
    settings_type = InBatchSettings

    @classmethod
    def footprint(
        cls, settings: InBatchSettings, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=0, own=0, pool=width)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return no_candidates(batch)


class MixedSampler(PositivesSampler[MixedSettings]):
    settings_type = MixedSettings

    def __init__(self, settings: MixedSettings, around: Surroundings) -> None:
        super().__init__(settings, around)
        self.uniform_count = settings.count

    @classmethod
    def footprint(
        cls, settings: MixedSettings, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=settings.count, own=settings.count, pool=width)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return uniform_candidates(self.graph, batch, draws, self.settings.count)
