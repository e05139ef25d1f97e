"""Uniform negatives among the items that a user has not interacted with (Rendle et al. 2009)."""

from typing import Literal, TypeVar

from pydantic import Field

from cnsdiff_dist import sections
from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.data.stream import Batch
from cnsdiff_dist.samplers.candidates import uniform_candidates
from cnsdiff_dist.samplers.protocol import EncodedBatch, Footprint, Ids, Negatives, Sampler


class CountSettings(sections.Negatives):
    count: int = Field(1, ge=1, description="negatives of a row, each drawn on its own")


class UniformSettings(CountSettings):
    kind: Literal["uniform"] = "uniform"


CountSettingsT = TypeVar("CountSettingsT", bound=CountSettings)


class DrawnSampler(Sampler[CountSettingsT]):
    """``count`` items of each row, drawn without a look at their scores: uniform ones."""

    @classmethod
    def footprint(
        cls, settings: CountSettingsT, generator: sections.Generator, width: int
    ) -> Footprint:
        return Footprint(candidates=settings.count, own=settings.count)

    def candidates(self, batch: Batch, draws: Draws) -> Ids:
        return uniform_candidates(self.graph, batch, draws, self.settings.count)

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        return Negatives(encoded.candidate_BMD, encoded.candidate_item_BM)


class UniformSampler(DrawnSampler[UniformSettings]):
    settings_type = UniformSettings
