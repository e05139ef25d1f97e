"""Adaptive hardness negative sampling: the easier the positive already is, the easier its negative.

Lai et al., "Adaptive Hardness Negative Sampling for Collaborative Filtering", AAAI 2024:
j = argmin over M uniform candidates of | s(u, j) - beta (s(u, i) + alpha)^(p + 1) | with p < 0,
so that the wanted score falls as the positive's rises. Here p = -2 and alpha = 1, and scores pass
a sigmoid first, so that the power is of a positive number on any scale; beta is
``negatives.hardness``.
"""

from typing import Literal

from pydantic import Field

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, choose, scores
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives


class AHNSSettings(CandidateSettings):
    kind: Literal["ahns"] = "ahns"
    hardness: float = Field(0.5, gt=0, description="beta, the scale of the wanted score")


class AHNSSampler(CandidateSampler[AHNSSettings]):
    settings_type = AHNSSettings

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        positive_B, score_BM = scores(encoded)
        wanted_B = self.settings.hardness * (positive_B.sigmoid() + 1.0) ** -1.0
        return choose(encoded, (score_BM.sigmoid() - wanted_B[:, None]).abs().argmin(1))
