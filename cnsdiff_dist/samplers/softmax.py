"""Softmax negative sampling among candidates.

Softmax(rho, M) of Shi et al., "On the Theories Behind Hard Negative Sampling for
Recommendation", WWW 2023: among M uniform candidates, p(j) ~ exp(s(u, j) / rho).
"""

from typing import Literal

import torch
from pydantic import Field

from cnsdiff_dist.data.draws import Draws
from cnsdiff_dist.samplers.candidates import CandidateSampler, CandidateSettings, choose, scores
from cnsdiff_dist.samplers.protocol import EncodedBatch, Negatives


class SoftmaxSettings(CandidateSettings):
    kind: Literal["softmax"] = "softmax"
    rho: float = Field(1.0, gt=0, description="temperature of the choice among M")


class SoftmaxSampler(CandidateSampler[SoftmaxSettings]):
    settings_type = SoftmaxSettings

    def negatives(self, encoded: EncodedBatch, draws: Draws, progress: float) -> Negatives:
        _, score_BM = scores(encoded)
        cumulative_BM = torch.softmax(score_BM.double() / self.settings.rho, dim=1).cumsum(1)
        draw_B1 = torch.from_numpy(draws.uniform(1)).to(score_BM.device)
        column_B = torch.searchsorted(cumulative_BM, draw_B1 * cumulative_BM[:, -1:])[:, 0]
        return choose(encoded, column_B.clamp(max=score_BM.shape[1] - 1))
